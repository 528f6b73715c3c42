"""Files and directories with no FUSE and no network in it: what the mount shows, and open handles.

`MeshFilesystem` has the shape of `types.Filesystem`; the FUSE adapter drives it, and so do tests.
"""

from meshkitfs.vfs._control import ControlFiles
from meshkitfs.vfs._filesystem import MeshFilesystem
from meshkitfs.vfs._opens import CALLER

__all__ = ["CALLER", "ControlFiles", "MeshFilesystem"]
