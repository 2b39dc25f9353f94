"""A process of somebody else, who uses the Hub of the tests."""

import os
import subprocess
import sys
from pathlib import Path

from helpers.hub_server import HubServer

TOKEN = "hf_" + "TestTokenThatIsNoRealOne" + "0123456789"
READER = "hf_" + "AnotherUsersTokenForTests" + "012345678"


def client(hub: HubServer, home: Path, token: str | None, *command: str) -> subprocess.CompletedProcess[str]:
    """A process of somebody else: its own home, the network on, this server as its Hub."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run([sys.executable, "-c", *command], env=environment, capture_output=True, text=True)
