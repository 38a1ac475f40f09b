// Makes the page live. Without it everything works, by loading the page again.
"use strict";

(() => {
  const root = document.documentElement;
  const words = document.body.dataset;
  const byId = (id) => document.getElementById(id);
  root.classList.add("js");

  const OLD_AFTER = 30_000; // good news is good for so long
  const LOST_AFTER = 15_000; // the server says something every 5 s
  const QUIET_FOR = 10_000; // between two things that a screen reader is told
  const SAID_FOR = 60_000; // what an action came to
  const HIDDEN_AFTER = 10_000; // a window nobody sees gives its connection back
  const HIDDEN_EVERY = 60_000;

  // ------------------------------------------------------------------ telling

  let wanted = "";
  let toldAt = -QUIET_FOR;
  let telling = 0;

  function tell(sentence) {
    wanted = sentence;
    if (telling) return;
    telling = setTimeout(() => {
      telling = 0;
      toldAt = performance.now();
      byId("announce").textContent = wanted;
    }, Math.max(100, toldAt + QUIET_FOR - performance.now()));
  }

  let forgetting = 0;

  function say(sentences) {
    clearTimeout(forgetting);
    if (sentences.length) forgetting = setTimeout(say, SAID_FOR, []);
    byId("said").replaceChildren(...sentences.map((sentence) => {
      const paragraph = document.createElement("p");
      paragraph.className = "said";
      paragraph.textContent = sentence;
      return paragraph;
    }));
  }

  function setText(element, text) {
    if (element && element.textContent !== text) element.textContent = text;
  }

  // ----------------------------------------------------------------- changing

  let pointerMovedAt = -Infinity;
  document.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") pointerMovedAt = performance.now();
  }, { passive: true });

  // Somebody reads or aims here: nothing may jump.
  function isHeld(element) {
    if (element.contains(document.activeElement)) return true;
    return performance.now() - pointerMovedAt < OLD_AFTER && element.matches(":hover");
  }

  const KEPT = new Set(["open", "value", "checked"]); // what the reader has set

  function morph(from, to) {
    if (from.matches("[data-hold]") && isHeld(from)) {
      morphHeld(from, to);
      return;
    }
    if (from.matches("[data-hold]")) showNews(from, 0);
    for (const { name } of [...from.attributes]) {
      if (!to.hasAttribute(name) && !KEPT.has(name)) from.removeAttribute(name);
    }
    for (const { name, value } of to.attributes) {
      if (!KEPT.has(name) && from.getAttribute(name) !== value) from.setAttribute(name, value);
    }
    if (from.tagName !== "TEXTAREA" && !from.matches(".news")) morphChildren(from, to);
  }

  // Elements are told apart by their id, the others by their order.
  function morphChildren(from, to) {
    const ids = new Set([...to.children].map((child) => child.id).filter(Boolean));
    const known = new Map([...from.children].filter((child) => child.id).map((child) => [child.id, child]));
    let here = from.firstChild;
    const isInTheWay = (node) => node.id ? !ids.has(node.id) : true;
    for (const next of [...to.childNodes]) {
      let match = null;
      if (next.id) {
        match = known.get(next.id) ?? null;
        while (match && here && here !== match && isInTheWay(here)) here = removed(here);
      } else if (here && !here.id && here.nodeType === next.nodeType && here.nodeName === next.nodeName) {
        match = here;
      }
      if (!match) {
        from.insertBefore(document.importNode(next, true), here);
        continue;
      }
      if (match === here) here = here.nextSibling;
      else from.insertBefore(match, here);
      if (match.nodeType === Node.ELEMENT_NODE) morph(match, next);
      else if (match.data !== next.data) match.data = next.data;
    }
    while (here) here = removed(here);
  }

  function removed(node) {
    const next = node.nextSibling;
    node.remove();
    return next;
  }

  // Rows stay where they are; what is new or gone is said and shown when asked for.
  function morphHeld(from, to) {
    const fresh = new Map([...to.querySelectorAll("tbody > tr")].map((row) => [row.id, row]));
    let changes = 0;
    for (const row of from.querySelectorAll("tbody > tr")) {
      const next = fresh.get(row.id);
      fresh.delete(row.id);
      if (next) {
        row.classList.remove("gone");
        morph(row, next);
      } else {
        changes += 1;
        row.classList.add("gone");
        setText(row.querySelector(".why"), words.gone);
      }
    }
    showNews(from, changes + fresh.size);
  }

  function showNews(table, number) {
    const button = table.parentElement.querySelector(".news button");
    if (!button) return;
    button.hidden = !number;
    setText(button, number === 1 ? words.newsOne : words.newsOther.replace("{number}", number));
  }

  let latest = null;

  function apply(state) {
    latest = state;
    document.title = state.title;
    const parsed = new DOMParser().parseFromString(`<div id="live">${state.html}</div>`, "text/html");
    const answer = () => (byId("answer-h") ?? byId("mentor-state"))?.textContent.trim();
    const before = answer();
    morph(byId("live"), parsed.getElementById("live"));
    prepare();
    if (answer() !== before) tell(answer());
  }

  function settle() {
    if (latest) apply(latest);
  }

  document.addEventListener("focusout", () => setTimeout(settle, 300));
  document.addEventListener("pointerout", (event) => {
    const table = event.target.closest?.("[data-hold]");
    if (table && !table.contains(event.relatedTarget)) setTimeout(settle, 300);
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".news button")) return;
    pointerMovedAt = -Infinity;
    settle();
    byId("main").focus({ preventScroll: true });
  });

  // ---------------------------------------------------------------- listening

  let source = null;
  let heardAt = performance.now();
  let lastClock = byId("updated")?.textContent.replace(words.updated?.replace("{clock}", "") ?? "", "");
  let paused = false;
  let ended = false;

  function heard(clock) {
    heardAt = performance.now();
    lastClock = clock;
    setText(byId("updated"), words.updated.replace("{clock}", clock));
    watch();
  }

  function listen() {
    if (source || paused || ended) return;
    source = new EventSource(words.stream);
    source.addEventListener("state", (event) => {
      const state = JSON.parse(event.data);
      apply(state);
      heard(state.clock);
    });
    source.addEventListener("beat", (event) => heard(JSON.parse(event.data).clock));
    source.addEventListener("ended", () => {
      ended = true;
      hangUp();
      setText(byId("lost"), words.ended);
    });
    source.addEventListener("error", () => {
      // While the browser tries again by itself, let it. Refused, it would not.
      if (source?.readyState === EventSource.CLOSED) {
        hangUp();
        setTimeout(listen, 5_000);
      }
    });
  }

  function hangUp() {
    source?.close();
    source = null;
  }

  function watch() {
    const silence = performance.now() - heardAt;
    root.classList.toggle("old", silence > OLD_AFTER || (silence > LOST_AFTER && !paused) || ended);
    if (ended) return;
    const lost = !paused && !document.hidden && silence > LOST_AFTER;
    setText(byId("lost"), lost ? words.lost.replace("{clock}", lastClock) : "");
  }

  // Asks for the page as anybody would; for windows that nobody sees.
  async function refresh() {
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (!answer.ok || answer.redirected) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const live = page.getElementById("live");
      if (!live) return;
      apply({ title: page.title, html: live.innerHTML });
      const updated = page.getElementById("updated").textContent;
      heard(updated.replace(words.updated.replace("{clock}", ""), ""));
    } catch {
      watch();
    }
  }

  let hiding = 0;
  let peeking = 0;

  function seen() {
    clearTimeout(hiding);
    clearInterval(peeking);
    if (document.hidden) {
      hiding = setTimeout(() => {
        hangUp();
        peeking = setInterval(() => { if (!paused && !ended) refresh(); }, HIDDEN_EVERY);
      }, HIDDEN_AFTER);
    } else {
      listen();
      watch();
    }
  }

  // ------------------------------------------------------------------- acting

  function prepare() {
    for (const button of document.querySelectorAll("[data-copy]")) button.hidden = !navigator.clipboard;
    for (const button of document.querySelectorAll("[data-busy]")) busy(button);
  }

  function busy(button) {
    button.setAttribute("aria-disabled", "true");
    setText(button, words.retrying);
  }

  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (!form.matches("[data-retry]")) return;
    event.preventDefault();
    const button = form.querySelector("button");
    if (button.getAttribute("aria-disabled") === "true") return;
    const before = button.textContent;
    busy(button);
    try {
      const answer = await fetch(form.action, {
        method: "POST",
        body: new URLSearchParams(new FormData(form)),
        headers: { Accept: "application/json" },
        credentials: "same-origin",
      });
      say((await answer.json()).sentences);
      if (!answer.ok) throw new Error(answer.status);
    } catch {
      if (!byId("said").textContent) say([words.notSent]);
      button.removeAttribute("aria-disabled");
      setText(button, before);
    }
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    await navigator.clipboard.writeText(byId(button.dataset.copy).textContent);
    say([words.copied]);
  });

  // ----------------------------------------------------------------- starting

  if (location.search.includes("said=")) {
    const address = new URL(location.href);
    address.searchParams.delete("said");
    history.replaceState(null, "", address);
  }

  if (!words.stream) return;
  prepare();
  byId("pause").hidden = false;
  byId("pause").addEventListener("click", () => {
    paused = !paused;
    setText(byId("pause"), paused ? words.resume : words.pause);
    if (paused) {
      hangUp();
      setText(byId("updated"), words.paused.replace("{clock}", lastClock));
    } else {
      heardAt = performance.now();
      listen();
    }
    watch();
  });
  setInterval(watch, 1_000);
  document.addEventListener("visibilitychange", seen);
  addEventListener("pagehide", hangUp);
  addEventListener("pageshow", (event) => { if (event.persisted) seen(); });
  seen();
})();
