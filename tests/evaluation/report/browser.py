# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""
Opens a page in a real Chromium without a screen (PySide6's Qt WebEngine), and tells as JSON what it does there.

``python browser.py PAGE WIDTH HEIGHT [SCREENSHOT [dark]]``: a process of its own, since a browser takes one over.
"""

import json
import os
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
# The sandbox of Chromium refuses to run as root, as in containers; the page is our own.
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu --no-sandbox" + (
    " --blink-settings=preferredColorScheme=0" if "dark" in sys.argv else ""
)

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

# What a reader does: opens everything, sorts each table by each column, by mouse and by keyboard.
SCRIPT = """
(() => {
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
  return JSON.stringify(result);
})()
"""


class Requests(QWebEngineUrlRequestInterceptor):
    """Notes every request."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def interceptRequest(self, info):
        self.urls.append(info.requestUrl().toEncoded().data().decode())


class Page(QWebEnginePage):
    """Notes what the console is told."""

    console: list

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.console.append(f"{line}: {message}")


def main(page_file: str, width: str, height: str, screenshot: str = "", *_) -> None:
    """Load, act, print, end."""
    application = QApplication([sys.argv[0]])
    profile, requests, view = QWebEngineProfile(), Requests(), QWebEngineView()
    profile.setUrlRequestInterceptor(requests)
    page = Page(profile, view)
    page.console = []
    page.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    # So that a request that the page should not make is seen, and not just refused.
    page.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    view.setPage(page)
    view.resize(int(width), int(height))
    view.show()

    def finish(text):
        result = json.loads(text)
        result["requests"], result["console"] = requests.urls, page.console
        print(json.dumps(result))
        sys.stdout.flush()
        if screenshot:
            QTimer.singleShot(700, lambda: (view.grab().save(screenshot), application.quit()))
        else:
            application.quit()

    def loaded(ok):
        if not ok:
            application.exit(1)
        QTimer.singleShot(200, lambda: page.runJavaScript(SCRIPT, finish))

    view.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(os.path.abspath(page_file)))
    QTimer.singleShot(60_000, lambda: application.exit(1))
    status = application.exec()
    # In this order, or Qt complains; its own tear-down may hang without a display.
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
