"""The filesystem as the kernel sees it: the mount's root, the shares in it, their files and handles.

Metadata is answered from memory; only opening something that is not loaded, and reading its blocks, goes
to the byte store. Every operation on a share first gets a grant: `Share.live` where a lease may be relied
on, `Share.use(..., current=True)` where an open must see the newest state. Names and attributes that the
kernel was already told stay visible after a refusal, so that the reason can be asked for; nothing else is.
"""

from __future__ import annotations

from meshkitfs.vfs._files import Files
from meshkitfs.vfs._listing import Listing
from meshkitfs.vfs._naming import Naming
from meshkitfs.vfs._xattr_access import XattrAccess

__all__ = ["MeshFilesystem"]


class MeshFilesystem(Naming, Files, Listing, XattrAccess):
    """All shares of a book, one directory each: has the shape of `types.Filesystem`."""
