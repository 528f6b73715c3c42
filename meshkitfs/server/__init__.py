"""The reference service: metadata, identity directory and MeshKit's records for many people, over HTTP.

docs/service.md is its wire. It stores signed bytes, checks who may have them, and can read no content.
Needs the packages of the extra ``server``.
"""

from meshkitfs.net import SecretSource
from meshkitfs.server._open import operate
from meshkitfs.server._run import invite, serve
from meshkitfs.server.settings import Settings, TlsFiles, is_postgresql, load

__all__ = ["SecretSource", "Settings", "TlsFiles", "invite", "is_postgresql", "load", "operate", "serve"]
