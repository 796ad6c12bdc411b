"""What axe-core (npm's package, as axe-playwright-python carries it) says about a page that is open in the browser."""

from __future__ import annotations

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

SERIOUS = ("serious", "critical")
SCHEMES = ("light", "dark")


def serious_faults(page: Page) -> list[str]:
    """The serious and critical faults of the page as it is shown now, in its light and its dark colours: rule, element, advice."""
    found = []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in SERIOUS:
                found += [f"{scheme}, {violation['id']}: {node['html'][:200]}\n{node['failureSummary']}" for node in violation["nodes"]]
    return found
