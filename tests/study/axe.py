"""What axe-core, an accessibility checker, finds on a page."""

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page


def violations(page: Page) -> list[str]:
    """The rules that the page breaks, each with the elements that break it."""
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {', '.join(node['html'] for node in rule['nodes'])}" for rule in found]
