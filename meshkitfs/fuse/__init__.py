"""The kernel's side of a mount: the only package that imports pyfuse3.

`mount.run` serves a `meshkitfs.vfs.types.Filesystem` at a directory, `preflight` looks at mount points
before and after (and needs no pyfuse3, so a diagnosis works where the binding does not). The modules:

- ``operations``: each kernel request becomes one call of the filesystem, each failure an errno.
- ``spin`` and ``workers``: how pyfuse3's worker tasks wait for requests, and the deadline of each.
- ``invalidate``: telling the kernel to forget, from a thread of its own.
- ``handover`` and ``helper``: having somebody else mount, and being that somebody.
- ``guard``: what this process needs so that one bad moment cannot stop it.
"""
