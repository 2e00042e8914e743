"""JupyterHub for a course: what binder/jupyterhub_config.py stands on, and what measures it."""
