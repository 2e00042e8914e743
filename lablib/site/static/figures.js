// Draws the figures of a lab when they come near the view, and replays explorers from stored frames.
(() => {
  "use strict";
  const here = document.currentScript.src;
  const scripts = new Map();

  // Runs a script that lies beside this one, once.
  function run(name) {
    if (!scripts.has(name)) {
      scripts.set(name, new Promise((done, failed) => {
        const script = document.createElement("script");
        script.src = new URL(name, here);
        script.onload = done;
        script.onerror = () => failed(new Error(`${script.src} did not load`));
        document.head.append(script);
      }));
    }
    return scripts.get(name);
  }

  // As the lab laid it out, but no wider than the page where it gives a width; on a phone, it scrolls.
  async function draw(figure, data, layout) {
    await run("plotly.min.js");
    const plot = figure.querySelector(".lab-plot");
    const touch = matchMedia("(pointer: coarse)").matches;  // a drag must scroll the page there
    const shape = {...layout, ...(touch ? {dragmode: false} : {})};
    plot.style.height = `${layout.height || 450}px`;
    plot.style.width = layout.width ? `${layout.width}px` : "";
    delete shape.width;
    await Plotly.react(plot, data, shape, {displayModeBar: false, responsive: true});
  }

  function start(figure) {
    const {data, layout} = JSON.parse(figure.querySelector("script").textContent);
    return draw(figure, data, layout || {});
  }

  // What a script of stored frames calls, with its own name.
  const stored = new Map();
  window.lablibFrames = (name, frames) => stored.set(name, frames);

  function place(control) {
    return control.type === "checkbox" ? Number(control.checked)
      : control.tagName === "SELECT" ? control.selectedIndex : Number(control.value);
  }

  function count(control) {
    return control.type === "checkbox" ? 2
      : control.tagName === "SELECT" ? control.options.length : Number(control.max) + 1;
  }

  function tell(control) {
    if (control.type !== "range") return;
    const words = JSON.parse(control.dataset.stops)[control.value];
    control.setAttribute("aria-valuetext", words);
    control.parentElement.querySelector(".lab-value").textContent = words;
  }

  const plain = (text) => new DOMParser().parseFromString(
    text.replace(/<\/?(br|sup|sub|b|i|em|span|a)\b[^>]*>/gi, " "), "text/html").body.textContent;

  async function show(box, controls) {
    const name = box.dataset.frames;
    await run(`frames/${name}.js`);
    const {pool, frames} = stored.get(name);
    // The last control's stops stand next to each other.
    const frame = frames[controls.reduce((at, one) => at * count(one) + place(one), 0)];
    const said = box.querySelector(".lab-said");
    const shown = box.querySelector(".lab-shown");
    if ("html" in frame) {
      shown.innerHTML = pool[frame.html];
      said.textContent = "The text below has changed.";
      return;
    }
    const part = (index) => structuredClone(pool[index]);  // Plotly writes into what it is given
    const layout = Object.fromEntries(Object.entries(frame.layout).map(([k, at]) => [k, part(at)]));
    const figure = shown.querySelector(".lab-figure");
    await draw(figure, frame.data.map(part), layout);
    const alt = plain(pool[frame.alt]);
    figure.querySelector(".lab-plot").setAttribute("aria-label", alt);
    said.textContent = plain(layout.title?.text || "") || alt;
  }

  function replay(box) {
    const controls = [...box.querySelectorAll(".lab-controls input, .lab-controls select")];
    const failed = (error) => { box.querySelector(".lab-said").textContent = error.message; };
    for (const control of controls) {
      control.addEventListener("input", () => {
        tell(control);
        show(box, controls).catch(failed);
      });
    }
  }

  document.querySelectorAll(".lab-replay").forEach(replay);
  const watch = new IntersectionObserver((seen) => seen.filter((one) => one.isIntersecting)
    .forEach((one) => {
      watch.unobserve(one.target);
      start(one.target).catch((error) => { one.target.textContent = error.message; });
    }), {rootMargin: "600px"});
  document.querySelectorAll(".lab-figure").forEach((figure) => watch.observe(figure));
})();
