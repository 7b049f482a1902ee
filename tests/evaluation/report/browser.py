# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Opens a page in a real Chromium without a screen, driven by selenium, and tells what it does there."""

import json
import shutil
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

# What a reader does: opens everything, sorts each table by each column, by mouse and by keyboard.
SCRIPT = """
return (() => {
  const result = {width: innerWidth, innerWidth, scrollWidth: [document.documentElement.scrollWidth]};
  for (const details of document.querySelectorAll("details")) details.open = true;
  result.scrollWidth.push(document.documentElement.scrollWidth);
  const outside = [...document.querySelectorAll("body *")].filter((element) =>
    !element.closest(".scroll, pre") && element.getBoundingClientRect().right > innerWidth + 0.5);
  result.outside = outside.map((element) => element.tagName + " " + element.className);
  result.smallest_text = Math.min(...[...document.querySelectorAll("p, td, th, li, caption, summary, button")]
    .map((element) => parseFloat(getComputedStyle(element).fontSize)));
  result.colours = ["color", "backgroundColor"].map((name) => getComputedStyle(document.body)[name]);
  result.tables = [...document.querySelectorAll("table")].map((table) => ({
    caption: table.caption?.textContent,
    columns: [...table.tHead.rows[0].cells].map((header) => {
      const sort = () => { header.querySelector("button").click(); return [header.getAttribute("aria-sort"),
        [...table.tBodies[0].rows].map((row) => row.cells[header.cellIndex].dataset.sort
          ?? row.cells[header.cellIndex].textContent.trim()),
        table.querySelectorAll("th[aria-sort]").length]; };
      return {name: header.textContent.trim(), scope: header.scope, focusable: header.querySelector("button").tabIndex,
        first: sort(), second: sort()};
    }),
    row_scopes: [...new Set([...table.querySelectorAll("tbody th")].map((header) => header.scope))],
  }));
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  result.repeated_ids = ids.filter((id, i) => ids.indexOf(id) !== i);
  result.dangling = [...document.querySelectorAll("use, [clip-path]")].map((element) =>
    (element.getAttribute("href") ?? element.getAttribute("xlink:href") ?? element.getAttribute("clip-path"))
      .replace(/^url\\(#|^#|\\)$/g, "")).filter((id) => !document.getElementById(id));
  result.svg_sizes = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width);
  result.scripts = document.scripts.length;
  result.images = document.images.length;
  result.handlers = [...document.querySelectorAll("*")].filter((element) =>
    [...element.attributes].some((attribute) => attribute.name.startsWith("on"))).length;
  result.hacked = window.hacked ?? false;
  result.text = document.body.innerText;
  for (const details of document.querySelectorAll("details")) details.open = false;
  scrollTo(0, 0);
  return result;
})()
"""


def browse(page: Path, width: int, height: int, *, dark: bool = False, screenshot: Path | None = None) -> dict:
    """What ``SCRIPT`` finds on a page in a window of this size, each URL asked for, and what the console was told."""
    options = ChromeOptions()
    options.binary_location = BROWSER
    # The sandbox of Chromium refuses to run as root, as in containers; the page is our own.
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options, Service(DRIVER)) as driver:
        # A window of its own is never as narrow as a phone's.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get_log("performance")  # what there was before this page
        driver.get(page.as_uri())
        seen = driver.execute_script(SCRIPT)
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [request["request"]["url"] for request in sent]
        seen["requests"] = [url for url in urls if not url.startswith("data:")]  # what the page itself holds
        seen["console"] = [entry["message"] for entry in driver.get_log("browser")]
        if screenshot is not None:
            driver.save_screenshot(str(screenshot))
    return seen
