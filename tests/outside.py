"""A method in a package of its own, as a user would write one."""

from __future__ import annotations

from pathlib import Path

METHOD = '''
from dataclasses import replace

from fedtailor.federated.method import MethodEntry
from fedtailor.methods import lora


class MineConfig(lora.LoraConfig):
    """LoRA's."""

    bold: bool = False


def build(cfg, r_max):
    return replace(lora.build(cfg, r_max), name="mine")


ENTRY = MethodEntry("mine", MineConfig, build, "My method", "LoRA under another name", colour="#123456", marker="*")
NUMBER = 3
'''
REFERENCE = "mypkg.mine:ENTRY"


def write_package(folder: Path, text: str = METHOD) -> Path:
    """Makes ``mypkg/mine.py`` below a folder, which has to be put on the import path."""
    package = folder / "mypkg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(text)
    return folder
