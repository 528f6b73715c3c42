"""Vaults and capability tokens of people who get new keys: what goes on, what ends, what can still be taken back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import t3_conditions
from t3_conditions import DENIED, MEMBER, REQUIRED, ask, give, issue, opens, refusal, refused, shown, signing

from meshkitfs.core.membership import LIST_LIFETIME_S, LIST_RENEW_S, Revocations, VaultRecord, revocations_id
from meshkitfs.core.pinned import Pinned

place, people, member = t3_conditions.place, t3_conditions.people, t3_conditions.member


def rotate(device):
    device.world.run(lambda: device.session.life.rotate(signing=True, encryption=True))


def hear(owner):
    """What the watcher of the owner's daemon does once a minute: members with new keys are granted to anew."""
    owner.refresh()
    owner.session.book._hearing._asked.clear()
    owner.session.book._next_look = 0
    owner.world.run(owner.session.book.renew_rosters)


def follow(owner):
    """And every few seconds: the vaults list them under their new keys."""
    owner.session.vaults._next_look = 0
    owner.world.run(owner.session.vaults.follow)


def unfollowed(owner):
    """Keep the watcher of the owner's daemon from following by itself."""
    owner.session.vaults._next_look = 1 << 40


def members_in(device, vault):
    return VaultRecord.parse_owned(shown(device, vault).record).members


# == vaults ==============================================================================================


def test_an_owner_with_new_keys_still_decides_who_is_in(member):
    """The vault stays signed with the key that the grants name, whatever its owner's newest is."""
    alice, bob, _ = member
    before = ask(alice, "vault.show", name="team")
    rotate(alice)
    opens(bob)
    ask(alice, "vault.add", name="team", member="carol")
    assert ask(alice, "vault.show", name="team")["vault"] == before["vault"]
    opens(bob)
    ask(alice, "vault.remove", name="team", member="bob")
    refused(bob, MEMBER, "vault", "does not list this identity")
    # A vault that is made now is the new key's, and serves a grant that is made now.
    made = ask(alice, "vault.create", name="new")
    assert made["vault"] == Pinned(made["id"], signing(alice).public).text != before["vault"]
    ask(alice, "vault.add", name="new", member="bob")
    give(alice, bob, vault="new")
    opens(bob)


def test_lists_of_a_replaced_key_are_renewed(member):
    alice, bob, vault = member
    issue(alice)
    former = revocations_id(signing(alice).public)
    rotate(alice)
    issue(alice)
    late = VaultRecord.parse_owned(shown(bob, vault).record).exp - LIST_RENEW_S + 3600
    alice.session.services.wall = lambda: late
    alice.session.lists._next_look = 0
    alice.world.run(alice.session.lists.renew)
    newest = revocations_id(signing(alice).public)
    for kind, list_id in ((VaultRecord, vault), (Revocations, former), (Revocations, newest)):
        assert kind.parse_owned(shown(bob, list_id).record).exp == late + LIST_LIFETIME_S


def test_a_member_with_new_keys_is_a_member_still(member):
    alice, bob, vault = member
    unfollowed(alice)
    rotate(bob)
    opens(bob)  # with the grant of before
    hear(alice)
    refused(bob, MEMBER, "vault", "does not list this identity")
    follow(alice)
    opens(bob)
    assert ask(alice, "vault.show", name="team")["members"] == ["bob"]
    assert VaultRecord.parse_owned(shown(bob, vault).record).lists(bob.session.identity.encryption.kid)
    ask(alice, "vault.remove", name="team", member="bob")
    refused(bob, MEMBER, "vault", "does not list this identity")


@pytest.mark.parametrize("trust", ["pinned", "blocked"])
def test_keys_that_no_chain_leads_to_are_not_followed(member, trust, monkeypatch):
    """Somebody else is called bob now; or the contact is blocked, because that was noticed."""
    alice, bob, vault = member
    unfollowed(alice)
    rotate(bob)
    hear(alice)
    contacts, before = alice.session.contacts, members_in(bob, vault)
    known = contacts.remembered("bob" if trust == "blocked" else "carol")
    if known is None:
        ask(alice, "vault.add", name="team", member="carol")
        ask(alice, "vault.remove", name="team", member="carol")
        known = contacts.remembered("carol")
    monkeypatch.setattr(contacts, "remembered", lambda _: replace(known, trust=trust))
    follow(alice)
    assert members_in(bob, vault) == before
    refused(bob, MEMBER, "vault", "does not list this identity")


# == capability tokens ===================================================================================


def test_an_issuer_with_new_keys_still_takes_tokens_back(people):
    """Both those of before, which a grant of before goes on asking for, and those of now."""
    alice, bob, carol = people
    give(alice, bob, ["write"], capability="editors")
    issue(alice)
    ask(bob, "capability.list")
    opens(bob)
    rotate(alice)
    opens(bob)
    (old,) = ask(alice, "capability.list")["issued"]
    give(alice, carol, capability="editors")
    issue(alice, "carol")
    ask(carol, "capability.list")
    opens(carol)
    ask(alice, "capability.revoke", token=old["token"])
    refused(bob, DENIED, "capability", "revoked by its issuer")
    opens(carol)
    (new,) = [row for row in ask(alice, "capability.list")["issued"] if not row["revoked"]]
    ask(alice, "capability.revoke", token=new["token"])
    refused(carol, DENIED, "capability", "revoked by its issuer")


def test_a_token_of_another_key_than_the_grant_names(people):
    """The grant is of before, the token of after: it opens nothing, and what helps is said."""
    alice, bob, _ = people
    give(alice, bob, capability="editors")
    rotate(alice)
    issue(alice)
    ask(bob, "capability.list")
    refused(bob, REQUIRED, "capability", "has to grant the share again with '--capability'")
    give(alice, bob, capability="editors")
    opens(bob)


def test_a_holder_with_new_keys_holds_their_tokens_still(people):
    alice, bob, carol = people
    give(alice, bob, ["write"], capability="editors")
    give(alice, carol, ["write"], capability="editors")
    issue(alice, rights=("write",))
    (held,) = ask(bob, "capability.list")["held"]
    rotate(bob)
    opens(bob)
    hear(alice)
    opens(bob)
    assert ask(bob, "capability.inspect", capability=held["id"])["mine"]
    assert not ask(carol, "capability.inspect", text=bob_text(bob, held))["mine"]
    assert refusal(carol, "capability.add", text=bob_text(bob, held)).code == DENIED
    given = ask(
        bob, "capability.narrow", capability=held["id"], recipient="carol", rights=["read"], send=False
    )
    ask(carol, "capability.add", text=given["text"])
    opens(carol)
    ask(alice, "capability.revoke", token=held["token"])
    for person in (bob, carol):
        refused(person, DENIED, "capability", "revoked by its issuer")


def bob_text(bob, held):
    return bob.session.tokens.find(held["id"]).to_text()
