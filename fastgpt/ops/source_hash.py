"""The hash of the extension's sources: kept in the extension when it is built, and compared with the sources later.

setup.py runs this file by its path, where neither PyTorch nor this package is installed: it imports Python's own
modules alone.
"""

import hashlib
from pathlib import Path


def source_hash(folder: Path) -> str:
    """Changes with the name or the content of any file of `folder`, which is csrc/."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
