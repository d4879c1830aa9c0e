// Every few seconds the page asks whether it has changed, and swaps only what differs: focus, typed text, scroll,
// open sections and selections stay. Without this script the page works; a person reloads it.
"use strict";
(() => {
  const every = 4000, slowest = 60000;
  const main = document.getElementById("main");
  const live = document.getElementById("live"), said = document.getElementById("live-text");
  let tag = null, wait = every, timer = 0, asking = false;

  const kept = (element, name) =>
    (name === "open" && element.tagName === "DETAILS") || (element.classList.contains("copy") && name === "hidden");

  const same = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);
  const keyOf = (node) => (node.nodeType === 1 ? node.getAttribute("data-key") || node.id || "" : "");

  function swap(old, fresh) {
    if (old.nodeType !== 1) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    if (old.isEqualNode(fresh) || (old.matches("input,select,textarea") && old === document.activeElement)) return;
    for (const { name } of [...old.attributes])
      if (!fresh.hasAttribute(name) && !kept(old, name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes)
      if (old.getAttribute(name) !== value && !kept(old, name)) old.setAttribute(name, value);
    children(old, fresh);
  }

  function children(old, fresh) {
    const named = new Map();
    for (const child of old.children) if (keyOf(child)) named.set(keyOf(child), child);
    let place = old.firstChild;
    for (const next of [...fresh.childNodes]) {
      const key = keyOf(next), twin = key ? named.get(key) : place;
      if (twin && same(twin, next)) {
        if (twin === place) place = place.nextSibling;
        else old.insertBefore(twin, place);
        swap(twin, next);
      } else {
        old.insertBefore(document.importNode(next, true), place);
        if (place && !key && !keyOf(place)) {
          const gone = place;
          place = place.nextSibling;
          gone.remove();
        }
      }
    }
    while (place) {
      const gone = place;
      place = place.nextSibling;
      gone.remove();
    }
  }

  function copyable() {
    if (!navigator.clipboard) return; // only where the browser trusts the address; the command can be selected
    for (const button of document.querySelectorAll("button.copy[hidden]")) button.hidden = false;
  }

  function tell(fine, text) {
    live.hidden = false;
    live.classList.toggle("stale", !fine);
    if (said.textContent !== text) said.textContent = text;
  }

  async function look() {
    if (asking) return;
    asking = true;
    clearTimeout(timer);
    try {
      const answer = await fetch(location.href.split("#")[0], {
        headers: tag ? { "if-none-match": tag } : {}, cache: "no-store", redirect: "error",
        signal: AbortSignal.timeout(15000),
      });
      const at = new Date(answer.headers.get("date") || Date.now()).toLocaleTimeString([], { hour12: false });
      if (answer.status === 200) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const fresh = page.getElementById("main");
        if (fresh) {
          children(main, fresh);
          if (document.title !== page.title) document.title = page.title;
          tag = answer.headers.get("etag");
          copyable();
        }
      }
      const fine = answer.status === 200 || answer.status === 304;
      wait = fine ? every : Math.min(slowest, wait * 2);
      tell(fine, fine ? at : answer.status === 401 ? "signed out" : `not answered (${answer.status})`);
    } catch {
      wait = Math.min(slowest, wait * 2);
      tell(false, "server away");
    }
    asking = false;
    if (!document.hidden) timer = setTimeout(look, wait);
  }

  document.addEventListener("visibilitychange", () => document.hidden ? clearTimeout(timer) : look());
  document.addEventListener("loractl-look", look);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input,select,textarea")) return;
    event.preventDefault();
    document.getElementById("q").focus();
  });
  copyable();
  tell(true, new Date().toLocaleTimeString([], { hour12: false }));
  timer = setTimeout(look, every);
})();
