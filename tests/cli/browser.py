"""A real browser for the report's page: open it, act, and read back what a reader would see."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
CATCH = """<script>
const faults = [];
addEventListener("error", (event) => faults.push(event.message));
addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
</script>"""
ANSWER = """<script>
addEventListener("load", () => {
  const result = (() => { %s })();
  const answer = document.createElement("script");
  answer.type = "application/json";
  answer.id = "answer";
  answer.textContent = JSON.stringify({ result, faults });
  document.body.append(answer);
});
</script>"""


def ask(page: Path, script: str, folder: Path, width: int = 1200) -> Any:
    """Return what ``script``, the body of a JavaScript function, returns on the loaded page.

    Fails the test on any error in the page, skips it where no browser is installed.
    """
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    driven = folder / "driven.html"
    text = page.read_text(encoding="utf-8")
    text = text.replace("<head>", "<head>" + CATCH, 1)
    driven.write_text(text.replace("</body>", ANSWER % script + "</body>"), encoding="utf-8")
    size = f"--window-size={width},900"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [program, *FLAGS, size, profile, "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    answer = re.search(r'<script type="application/json" id="answer">(.*?)</script>', done.stdout)
    assert answer is not None, done.stderr
    found = json.loads(answer.group(1))
    assert found["faults"] == []
    return found["result"]
