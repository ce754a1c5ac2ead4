"""A compose file with one service: the engine in its image, the checkpoint mounted read-only."""

import json
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.deploy.hardware import HARDWARE
from tokensieve.deploy.planning import Deployment

VLLM_IMAGE = "vllm/vllm-openai:latest"
CONTAINER_MODEL = "/model"
NPU_DRIVER = (
    "/usr/local/sbin",
    "/usr/local/Ascend/driver",
    "/usr/local/Ascend/firmware",
    "/etc/ascend_install.info",
)


def compose_file(deployment: Deployment) -> dict[str, Any]:
    """The contents of the compose file.

    The port is published on the loopback interface only, because neither engine authenticates its callers.
    """
    port = 8000 if deployment.engine == "vllm" else 30000
    maker = HARDWARE[deployment.hardware].maker
    npu = maker == "npu"
    volumes = {str(deployment.folder): CONTAINER_MODEL}
    # SGLang listens on its own loopback interface by default, which nobody outside the container can reach.
    listen = ("--host", "0.0.0.0", "--port", str(port)) if deployment.engine == "sglang" and not npu else ()
    service: dict[str, Any] = {
        "image": VLLM_IMAGE if deployment.engine == "vllm" else HARDWARE[deployment.hardware].image,
        "entrypoint": list(deployment.command(CONTAINER_MODEL, listen)),
        "ipc": "host",
    }
    if npu:  # the devices need the host's network and its driver
        service |= {"privileged": True, "network_mode": "host", "shm_size": "16gb"}
        names = [*(f"davinci{i}" for i in range(deployment.gpus)), "davinci_manager", "hisi_hdc"]
        service["devices"] = [f"/dev/{name}:/dev/{name}" for name in names]
        volumes |= {path: path for path in NPU_DRIVER}
    else:
        service["ports"] = [f"127.0.0.1:{port}:{port}"]
    if maker == "amd":
        service |= {"devices": ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"], "group_add": ["video"]}
        service |= {"cap_add": ["SYS_PTRACE"], "security_opt": ["seccomp=unconfined"]}
    if maker == "nvidia":
        devices = [{"driver": "nvidia", "count": deployment.gpus, "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    service["volumes"] = [
        {"type": "bind", "source": source, "target": target, "read_only": True} for source, target in volumes.items()
    ]
    return {"services": {deployment.engine: service}}


def write_compose(deployment: Deployment, path: Path) -> None:
    """Write the compose file as JSON, which is valid YAML and needs no library.

    Raises UserError if `path` exists, or if the checkpoint's folder holds symbolic links.
    """
    if path.exists():
        raise UserError(f"{path} exists already; name another file, or remove it first")
    folder = deployment.folder
    if any(file.is_symlink() for file in folder.iterdir()):
        raise UserError(
            f"{folder} holds links, which lead nowhere in a container; copy it with cp -rL and name the copy"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(compose_file(deployment), indent=2, ensure_ascii=False)
    path.write_text(text.replace("$", "$$") + "\n", encoding="utf-8")  # compose expands $NAME; $$ is a literal $
