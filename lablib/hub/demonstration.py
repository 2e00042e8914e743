"""The demonstration's login: one password for every name, and loopback or nothing."""

import re
import sys
from typing import Any

from jupyterhub.authenticators.shared import SharedPasswordAuthenticator

from lablib.hub.loopback import refusal


class DemonstrationAuthenticator(SharedPasswordAuthenticator):
    """Lets anybody in who knows the password, under any name, on this machine alone.

    The hub makes it after the configuration file and the command line are read and before
    anything listens. Ends the process, with one sentence, when something would listen elsewhere.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self.parent is not None and (sentence := refusal(addresses(self.parent))):
            print(sentence, file=sys.stderr, flush=True)
            self.parent.exit(2)


def addresses(app: Any) -> dict[str, str]:
    """What a JupyterHub, its proxy and its users' servers would listen on, by setting."""
    spawner = app.spawner_class(config=app.config)  # of nobody, to see what it would be told
    found = {
        "c.JupyterHub.bind_url": app.bind_url,
        "c.JupyterHub.hub_ip": app.hub_ip,
        "c.JupyterHub.hub_bind_url": app.hub_bind_url,
        "c.ConfigurableHTTPProxy.api_url": getattr(app.proxy, "api_url", ""),
    }
    found = {name: address for name, address in found.items() if address or "_url" not in name}
    found["c.Spawner.ip"] = spawner.ip
    for word in spawner.args:
        if given := re.match(r"--(?:\w+\.)?ip=(.*)", word):
            found["c.Spawner.args"] = given[1]
    return found
