"""Files for file managers, which ``meshkitfs desktop install`` puts where those look for them.

``nautilus_extension`` runs inside the file manager, under the system's Python: it imports nothing of this
program, and learns everything from the ``user.meshkit.*`` attributes. ``servicemenu.desktop`` is a context
menu for Dolphin.
"""
