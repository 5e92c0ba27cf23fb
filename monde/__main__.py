"""`python -m monde`, for environments without the script."""

from monde.cli.main import app

app(prog_name="monde")
