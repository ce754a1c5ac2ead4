"""The rules of the house: import order, names, sizes, exceptions, pickle, documentation, and what may be committed.

Reads sources with `ast` and imports nothing heavy, so that it can run before every commit.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tokensieve"

# A file imports only from places to its left; inside a package the order is free. `__init__` is the public interface,
# which the demo uses as a reader would.
ORDER = (
    "integers config posttrain_config profile_config share_config evaluate_config paper_config families importing "
    "machine files "
    "run_record tethered server_process mesh cost ops checkpoint model selectors sandbox tasks data engine evals bench "
    "train posttrain profile serve lm_eval deploy report __init__ demo speedrun pipeline doctor cli __main__"
).split()

MAX_LINES = 450
MAX_WIDTH = 120
MAX_KERNEL_LINES = 600  # one kernel family per file, forward and backward together
CATCH_ALL_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
PICKLE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

# In pieces, so that this file passes its own test.
FORBIDDEN = [
    "/" + "work/",
    "/." + "library",
    "." + "library/",
    "/tmp/" + "plan",
    "/tmp/" + "issues",
    "/root/." + "pyenv",
    "/opt/" + "wheels",
    "/opt/" + "pypi",
    "pypi" + ".org",
    "python" + "hosted.org",
    "npmjs" + ".org",
    "debian" + ".org",
    "anaconda" + ".org",
    "crates" + ".io",
    "golang" + ".org",
    "download.pytorch" + ".org",
    "claude" + ".ai",
    "claude" + " code",
    "anth" + "ropic",
    "github " + "copilot",
]
# Where one `except Exception` stands, for the reason that its comment gives.
MAY_CATCH_ALL = {"tokensieve/engine/service.py"}
UNOWNED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b(?!\s*\([A-Za-z])")


def committed_files() -> list[Path]:
    """Every file that is committed or would be: tracked, or untracked and not ignored."""
    names = None
    if shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True)
        names = listing.stdout.decode().split("\0") if listing.returncode == 0 else None
    if names is None:  # no git, or an unpacked source archive
        paths = [p for top in (PACKAGE, ROOT / "tests", ROOT / "docs") for p in top.rglob("*")]
    else:
        paths = [ROOT / name for name in names if name]
    return sorted({p for p in paths if p.is_file() and "__pycache__" not in p.parts})


FILES = committed_files()
SOURCES = [p for p in FILES if p.suffix == ".py"]
PACKAGE_SOURCES = [p for p in SOURCES if p.is_relative_to(PACKAGE)]
SHIPPED_SOURCES = [p for p in SOURCES if not p.is_relative_to(ROOT / "tests")]  # tests may damage things on purpose


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def place(path: Path) -> str:
    """The part of the house that a file belongs to: its top-level module or package."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def is_place(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def imported_modules(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions too; relative ones are resolved."""
    package = ("tokensieve", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_places(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imported_modules(tree, path):
        parts = module.split(".")
        if parts[0] == "tokensieve":
            yield line, parts[1] if len(parts) > 1 and is_place(parts[1]) else "__init__"


@each(PACKAGE_SOURCES)
def test_imports_go_one_way(path: Path) -> None:
    here = place(path)
    assert here in ORDER, f"{name_of(path)}: '{here}' has no place in ORDER; say in tests/test_house.py where it stands"
    for line, there in imported_places(parse(path), path):
        assert there in ORDER, f"{name_of(path)}:{line}: '{there}' has no place in ORDER"
        allowed = there == here or ORDER.index(there) < ORDER.index(here)
        assert allowed, f"{name_of(path)}:{line}: {here} may not import {there}, which stands to its right"


@each(SOURCES)
def test_size_and_name(path: Path) -> None:
    limit = MAX_KERNEL_LINES if {"triton", "hopper"} & set(path.parts) else MAX_LINES
    text = path.read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(text, 1) if len(line) > MAX_WIDTH and path.is_relative_to(PACKAGE)]
    assert not wide, f"{name_of(path)}:{wide[0]} is wider than {MAX_WIDTH} columns"
    lines = len(text)
    assert lines <= limit, f"{name_of(path)} has {lines} lines: split it (one idea per file, {limit} at most)"
    names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not names & CATCH_ALL_NAMES, f"{name_of(path)}: name the file after its one idea"


def is_bare_reraise(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@each(SHIPPED_SOURCES)
def test_no_broad_except(path: Path) -> None:
    left = 1 if name_of(path) in MAY_CATCH_ALL else 0
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        where = f"{name_of(path)}:{node.lineno}"
        assert node.type is not None, f"{where}: bare except: name the exceptions"
        caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        left -= "Exception" in caught
        assert left >= 0, f"{where}: except Exception: name the exceptions"
        assert "BaseException" not in caught or is_bare_reraise(node), (
            f"{where}: except BaseException must end in raise"
        )


@each(SHIPPED_SOURCES)
def test_no_pickle(path: Path) -> None:
    tree = parse(path)
    if path.is_relative_to(PACKAGE):
        for line, module in imported_modules(tree, path):
            assert module.split(".")[0] not in PICKLE_MODULES, (
                f"{name_of(path)}:{line}: {module}: use safetensors or JSON"
            )
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        where = f"{name_of(path)}:{node.lineno}"
        called = ast.unparse(node.func)
        assert called not in {"torch.load", "torch.save"}, f"{where}: {called} is pickle: use safetensors"
        keywords = {k.arg: k.value for k in node.keywords}
        allow = keywords.get("allow_pickle")
        assert allow is None or ast.unparse(allow) == "False", f"{where}: allow_pickle: use safetensors"


@each(PACKAGE_SOURCES)
def test_no_global_state(path: Path) -> None:
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), f"{name_of(path)}:{node.lineno}: 'global': pass the state down"


def text_of(path: Path) -> str | None:
    """A file's text, or None for a binary one."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def test_nothing_machine_specific_is_committed() -> None:
    found = []
    for path in FILES:
        text = (text_of(path) or "").lower()
        for number, line in enumerate(text.splitlines(), 1) if any(word in text for word in FORBIDDEN) else ():
            found += [f"{name_of(path)}:{number}: contains '{word}'" for word in FORBIDDEN if word in line]
    assert not found, "\n".join(found)


def test_every_open_end_has_an_owner() -> None:
    found = []
    for path in FILES:
        for number, line in enumerate((text_of(path) or "").splitlines() if path.suffix in {".py", ".toml"} else (), 1):
            if UNOWNED.search(line):
                found.append(f"{name_of(path)}:{number}: an open end without an owner: write the name in parentheses")
    assert not found, "\n".join(found)


def takes_tensors(function: ast.FunctionDef) -> bool:
    annotations = [a.annotation for a in (*function.args.args, *function.args.kwonlyargs)] + [function.returns]
    return any("Tensor" in ast.unparse(annotation) for annotation in annotations if annotation)


def public_ops() -> list[ast.FunctionDef]:
    """The public functions of tokensieve.ops that take or return tensors."""
    sources = [path for name in ("__init__.py", "paged.py") if (path := PACKAGE / "ops" / name).is_file()]
    functions = [node for source in sources for node in parse(source).body if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if not f.name.startswith("_") and takes_tensors(f)]


@pytest.mark.parametrize("function", public_ops(), ids=lambda f: f.name)
def test_ops_say_shapes_and_source(function: ast.FunctionDef) -> None:
    doc = ast.get_docstring(function) or ""
    assert re.search(r"\([A-Z]\b[^)]*\)|\b\w+_[A-Z]{1,4}\b", doc), f"ops.{function.name}: its docstring names no shape"
    cited = re.search(r"source|equation|paper|report|demo|section", doc, re.IGNORECASE)
    assert cited, f"ops.{function.name}: its docstring names no source"


@pytest.mark.parametrize("path", sorted((PACKAGE / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_config_loads(path: Path) -> None:
    from tokensieve import config, evaluate_config, paper_config, posttrain_config, profile_config, share_config
    from tokensieve.cost import prices

    named = f"{path.stem.split('-')[0].title()}Config"  # demo.toml, speedrun.toml; every other file is a training run
    modules = config, evaluate_config, posttrain_config, profile_config, paper_config, share_config, prices
    kind = next((getattr(m, named) for m in modules if hasattr(m, named)), config.TrainConfig)
    assert isinstance(config.load_config(kind, str(path)), kind)


# The checks themselves, on sources that break a rule.


def test_import_resolution() -> None:
    source = (
        "import tokensieve\nfrom . import indexer\nfrom ..ops import quant\nfrom tokensieve.ops import x\nimport torch"
    )
    found = list(imported_places(ast.parse(source), PACKAGE / "ops" / "triton" / "loss.py"))
    assert found[0] == (1, "__init__")
    assert [where for _, where in found[1:]] == ["ops", "ops", "ops"]


def test_unowned_pattern() -> None:
    assert UNOWNED.search("# TO" + "DO: later")
    assert not UNOWNED.search("# TO" + "DO(ada): later")
