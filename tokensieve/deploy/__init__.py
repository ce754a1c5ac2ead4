"""Exported checkpoints in other engines: check one, then print or run the command of vLLM or SGLang that serves it.

`refusals` lists the reasons why an engine could not serve a checkpoint, `hardware` the machines and their images,
`planning` makes the command, `compose` the file for containers, and `command` is `tokensieve deploy`.

The commands and images are those of the DeepSeek-V3.2-Exp release and of the engines' own pages about it. Options that
those sources do not mention are not passed, so the engines' defaults apply. Sources, read in 2026: the README of
DeepSeek-V3.2-Exp, SGLang's page on DeepSeek V3.2 (images, the command on H200 and B200), its announcement of support
(NPUs) and its pages on Ascend NPUs and AMD GPUs (devices and volumes of a container), vLLM's recipe for DeepSeek-V3.2
and its page on Docker.
"""

from tokensieve.deploy.command import deploy
from tokensieve.deploy.planning import Deployment, plan

__all__ = ["Deployment", "deploy", "plan"]
