// Names and keyboard stops that the theme's own markup lacks, as axe-core asks for them.
(() => {
  "use strict";
  // A theme in the sidebar unfolds by a chevron without a word.
  function name(summary) {
    const theme = summary.closest("li").querySelector("a").textContent.trim();
    summary.setAttribute("aria-label", `Labs of: ${theme}`);
  }

  // What scrolls sideways must be reached by the keyboard, to be scrolled by it.
  function reach() {
    for (const box of document.querySelectorAll("mjx-container, .output, pre")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  }

  document.querySelectorAll("nav li summary").forEach(name);
  // Its label leaves out the keys that it shows.
  document.querySelectorAll("button.search-button-field")
    .forEach((button) => button.removeAttribute("aria-label"));
  addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    reach();
  });
  addEventListener("resize", reach);
})();
