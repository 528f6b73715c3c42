"""The grammar of ``identity`` and ``contacts``."""

from __future__ import annotations

from . import _init, _people
from ._devices import device_commands
from ._grammar import Adder, descriptor
from ._init_grammar import join_option, moved_options, store_options
from ._moving import moving_commands

__all__ = ["people_commands"]


def people_commands(add: Adder) -> None:
    identity = add.group("identity", "show, create, publish, rotate and move your own identity")
    show = identity.command("show", _people.identity_show, "show your identity and what protects its keys")
    show.add_argument(
        "--export", action="store_true", help="print only the public record, for 'contacts add'"
    )
    create = identity.command(
        "create", _init.create_identity, "create an identity without publishing it (else as 'init')"
    )
    create.add_argument("name", metavar="NAME", nargs="?", help="(default: your login name)")
    store_options(create)
    publish = identity.command("publish", _people.identity_publish, "publish your identity in the directory")
    join_option(publish)
    rotate = identity.command(
        "rotate",
        _people.identity_rotate,
        "give your identity new keys, signed by the old ones, and sign your shares with them",
    )
    rotate.add_argument(
        "--replace",
        dest="keys",
        choices=("both", "signing", "encryption", "none"),
        default="both",
        help="which keys to replace; 'none' only renews the record that says which they are (default: both)",
    )
    rotate.add_argument(
        "--again",
        action="store_true",
        help="begin another rotation though the last one left shares that could not be signed",
    )
    rotate.add_argument(
        "--every",
        metavar="TIME",
        help="not now, but so often by itself while mounted, such as 180d; or never",
    )
    identity.command(
        "doctor", _people.identity_doctor, "check the keys, their records, and what would bring them back"
    )
    moving_commands(identity, moved_options, descriptor)
    device_commands(add, moved_options, join_option)

    contacts = add.group("contacts", "the people you share with, and how sure you are of their keys")
    contacts.command("list", _people.contacts_list, "list your contacts")
    person = contacts.command(
        "add",
        _people.contacts_add,
        "add a contact from the directory or from a record",
        example="meshkitfs contacts add bob bob.identity",
    )
    person.add_argument("handle", metavar="NAME")
    person.add_argument(
        "record", metavar="RECORD", nargs="?", help="their exported record: text, a file, or -"
    )
    verify = contacts.command(
        "verify", _people.contacts_verify, "show the code to compare with a contact, or confirm it"
    )
    verify.add_argument("handle", metavar="NAME")
    verify.add_argument("code", metavar="CODE", nargs="*", help="the code the contact told you")
    verify.add_argument(
        "--qr", action="store_true", help="show the code as a QR code too, for a phone to read to the other"
    )
