"""JupyterHub for a course: what `make hub` starts, and the one file to carry to a real server.

As it stands it is a demonstration on this machine alone. Five places are to be changed, each with
the lines that a real server has there; binder/README.md goes through them.
"""

import os
import secrets
import sys
from pathlib import Path
from urllib.parse import urlencode

from lablib.paths import PACKAGE, cache_dir, project_dir

c = get_config()  # noqa: F821
STATE = Path(os.environ.get("LABLIB_HUB", "build/hub")).resolve()  # secrets, users, their homes
STATE.mkdir(parents=True, exist_ok=True, mode=0o700)

c.JupyterHub.bind_url = "http://127.0.0.1:8000"  # a real server: behind HTTPS
c.JupyterHub.db_url = f"sqlite:///{STATE}/hub.sqlite"
c.JupyterHub.cookie_secret_file = str(STATE / "cookie_secret")
c.ConfigurableHTTPProxy.pid_file = str(STATE / "proxy.pid")

# The labs: a git repository from which each student's copy is made, and updated at every start.
# A real server: ("https://github.com/YOU/YOUR-COURSE", "main"), a repository with the labs in it.
LABS, BRANCH = f"file://{STATE}/labs.git", "main"
COPY = {"repo": LABS, "branch": BRANCH, "targetpath": "labs"}
START = "lab/tree/labs/00-start-here.ipynb"
c.Spawner.default_url = "/git-pull?" + urlencode({**COPY, "urlpath": START})

# == 1. AUTHENTICATOR: who may log in =============================================================
c.JupyterHub.authenticator_class = "lablib.hub.demonstration.DemonstrationAuthenticator"
PASSWORD = os.environ.get("LABLIB_HUB_PASSWORD") or secrets.token_urlsafe(9)
c.SharedPasswordAuthenticator.user_password = PASSWORD  # one for all: no student is protected
c.Authenticator.allow_all = True
c.Authenticator.username_pattern = "[a-z][a-z0-9-]{0,30}$"  # it names the student's folder
# A real server (pip install oauthenticator; or "pam", for the machine's own users):
# c.JupyterHub.authenticator_class = "google"  # or "github", "azuread", "generic-oauth", "lti13"
# c.OAuthenticator.client_id, c.OAuthenticator.client_secret = ..., ...
# c.OAuthenticator.oauth_callback_url = "https://hub.example.edu/hub/oauth_callback"
# c.Authenticator.allow_all = False  # and delete `username_pattern`
# c.Authenticator.allowed_users = {"ada", "alan"}
# c.Authenticator.admin_users = {"you"}

# == 2. SPAWNER: where a student's server runs ====================================================
c.JupyterHub.spawner_class = "simple"  # processes of the one user who starts the hub
c.SimpleLocalProcessSpawner.home_dir_template = f"{STATE}/users/{{username}}"
c.Spawner.cmd = [sys.executable, "-m", "lablib.hub.server"]  # home, cache, limits, fence
c.Spawner.notebook_dir = "~"
c.Spawner.args = ["--allow-root"] if os.geteuid() == 0 else []  # root: in a container
c.Spawner.http_timeout = c.Spawner.start_timeout = 180  # seconds; a class may start all at once
# A real server, a container a student (pip install dockerspawner; kubespawner is alike), or with
# "systemd" (pip install jupyterhub-systemdspawner) a unit each. Delete `cmd` above with it:
# c.JupyterHub.spawner_class = "docker"
# c.DockerSpawner.image = "lablib"  # repo2docker --image-name lablib .
# c.DockerSpawner.volumes = {"lablib-{username}": "/home/jovyan/work"}
# c.Spawner.notebook_dir = "/home/jovyan/work"
# c.JupyterHub.hub_ip = "0.0.0.0"  # the containers must reach the hub; keep its port closed outside
# c.DockerSpawner.remove = True

# == 3. LIMITS: memory and processor of a student =================================================
c.Spawner.mem_limit = "2G"  # the largest lab takes 1.6 GB; the demonstration limits each process
c.Spawner.cpu_limit = 2.0
c.JupyterHub.concurrent_spawn_limit = 10
# Docker, systemd and Kubernetes hold a server to both; with Kubernetes also guarantee some:
# c.Spawner.mem_guarantee, c.Spawner.cpu_guarantee = "1G", 0.5

# == 4. CULLING: what nobody uses is stopped; files stay ==========================================
IDLE_SERVER, IDLE_KERNEL = 3600, 1200  # seconds
c.JupyterHub.services = [
    {
        "name": "cull",
        "command": [sys.executable, "-m", "jupyterhub_idle_culler", f"--timeout={IDLE_SERVER}"],
    }
]
SCOPES = ["list:users", "read:users:activity", "read:servers", "delete:servers"]
c.JupyterHub.load_roles = [{"name": "cull", "scopes": SCOPES, "services": ["cull"]}]
c.Spawner.args += [
    f"--MappingKernelManager.cull_idle_timeout={IDLE_KERNEL}",  # one whose page is closed
    "--MappingKernelManager.cull_interval=60",
]

# == 5. ENVIRONMENT: packages, data and settings of the course ====================================
# All students use the environment that the hub runs in, and one cache of corpora and models; they
# can write to neither.
JUPYTER, PYTHON = PACKAGE / "hub" / "jupyter", sys.executable  # the "Clean copy" button, merges
BELOW = (project_dir() or Path(sys.prefix)) / ".venv"  # of the labs, where `make hub` is used
# A real server with repo2docker's image; delete the last three lines below, too:
# JUPYTER, PYTHON = "/home/jovyan/lablib/hub/jupyter", "python"
c.Spawner.environment = {
    "HF_HUB_OFFLINE": "1",  # labs download nothing
    # "LABLIB_TIER": "cpu",  # unset: gpu where CUDA is, else cpu
    # Updates leave alone what a student edited or ran.
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "core.attributesFile",
    "GIT_CONFIG_VALUE_0": str(JUPYTER / "gitattributes"),
    "GIT_CONFIG_KEY_1": "merge.lablib.driver",
    "GIT_CONFIG_VALUE_1": f"{PYTHON} -m lablib.hub.merge %O %A %B",
    "JUPYTER_CONFIG_PATH": f"{JUPYTER}:{BELOW}/etc/jupyter",
    "JUPYTER_PATH": f"{JUPYTER}:{BELOW}/share/jupyter",
    "JUPYTERLAB_DIR": f"{BELOW}/share/jupyter/lab",
    "LABLIB_HOME": str(cache_dir()),
    "LABLIB_HUB": str(STATE),
}
