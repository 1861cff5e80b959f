// Follows Airflow's theme, keeps a page fresh while it is looked at, and lets links leave the
// iframe: Airflow's sandbox allows scripts, but neither new tabs nor other pages at the top.
"use strict";

const EVERY = 3; // seconds between two looks
const SLOWEST = 60; // seconds, after errors

function parentPage() {
  try {
    return window.parent !== window ? window.parent.document : null;
  } catch {
    return null; // of another site: we cannot look into it
  }
}

function followTheme() {
  const airflow = parentPage();
  if (!airflow) return;
  const root = airflow.documentElement;
  const take = () => {
    const dark = root.classList.contains("dark");
    const light = root.classList.contains("light");
    const ours = document.documentElement;
    if (dark || light) ours.dataset.theme = dark ? "dark" : "light";
    const ground = getComputedStyle(airflow.body).backgroundColor;
    if (ground && !ground.startsWith("rgba(0, 0, 0, 0")) ours.style.setProperty("--ground", ground);
  };
  take();
  new MutationObserver(take).observe(root, { attributes: true, attributeFilter: ["class"] });
}

function leave(event) {
  const link = event.target.closest("a[data-leave]");
  const airflow = parentPage();
  if (!link || !airflow || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const other = airflow.createElement("a");
  other.href = link.href;
  if (link.dataset.leave === "new") {
    other.target = "_blank";
    other.rel = "noopener noreferrer";
  }
  airflow.body.append(other);
  other.click();
  other.remove();
}

function replace(live, html) {
  const open = [...live.querySelectorAll("details[open][id]")].map((one) => one.id);
  const focus = document.activeElement;
  const focused = live.contains(focus) ? focus.id || focus.getAttribute("href") : null;
  const scrolled = [...live.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
  const fresh = new DOMParser().parseFromString(html, "text/html").body;
  live.replaceChildren(...fresh.childNodes);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  live.querySelectorAll(".scroll").forEach((one, place) => {
    one.scrollLeft = scrolled[place] || 0;
  });
  if (focused) {
    const again = [...live.querySelectorAll("a, summary, [id]")].find(
      (one) => one.id === focused || one.getAttribute("href") === focused,
    );
    again?.focus({ preventScroll: true });
  }
}

// The newest days are at the right end.
function showNewest() {
  const box = document.getElementById("calendar")?.closest(".scroll");
  if (box) box.scrollLeft = box.scrollWidth;
}

function keepFresh() {
  const live = document.getElementById("live");
  if (!live) return;
  const every = Number(live.dataset.every || EVERY);
  let pause = every;
  let timer = 0;
  const state = () => live.querySelector("[data-final]");
  const isFinal = () => state()?.dataset.final === "true";

  async function look() {
    try {
      const answer = await fetch(live.dataset.src, { credentials: "same-origin" });
      if (!answer.ok) throw new Error(String(answer.status));
      const before = state()?.dataset.news;
      replace(live, await answer.text());
      const now = state()?.dataset.news;
      if (now && now !== before) document.getElementById("news").textContent = now;
      document.body.classList.remove("stale");
      pause = every;
    } catch {
      document.body.classList.add("stale");
      pause = Math.min(pause * 2, SLOWEST);
    }
    plan();
  }

  function plan() {
    clearTimeout(timer);
    if (!document.hidden && !isFinal()) timer = setTimeout(look, pause * 1000);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !isFinal()) look();
  });
  plan();
}

followTheme();
document.addEventListener("click", leave);
document.addEventListener("DOMContentLoaded", () => {
  showNewest();
  keepFresh();
});
