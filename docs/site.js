// The theme wraps tables and adds copy buttons once the page is there. A table that scrolls must be in reach of
// the keyboard, and landmarks need names of their own.
new MutationObserver(() => {
  for (const wrap of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])"))
    if (wrap.scrollWidth > wrap.clientWidth) wrap.tabIndex = 0;
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => (nav.ariaLabel = `Code ${i + 1}`));
}).observe(document.body, { childList: true, subtree: true });
