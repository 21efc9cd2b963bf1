/* Explorable figures: a picture that answers to sliders, drawn from numbers of the page.

   To add one that is called NAME:

   1. Write book/_static/explorables/NAME.js:

        Explorables.add("NAME", {
          controls: data => [            // in the order of the page; a slider or a choice
            {name: "beta", label: "price β", min: 0, max: 1, step: 0.1, value: 0.5,
             show: x => Explorables.fixed(x, 1)},       // optional: how the value reads
            {name: "kind", label: "estimator", options: ["k1", "k2", "k3"], value: "k1",
             radio: true},                             // optional: all options are seen
          ],
          legend: [["blue", "line", "value"], ...],     // optional; line, dash, bar, dot, arrow
          compute: (p, data) => ({kl: ...}),            // pure: p.beta, p.kind; no page, no drawing
          draw: (picture, result, p, data) => {...},    // see Picture and Panel below
          say: (result, p, data) => "One sentence: what the picture now shows.",
        });

      A slider may have `of: position => parameter` (a logarithmic one: `of: x => 10 ** x`; min,
      max, step and value are positions then, and `show` gets the parameter).
      What is neither may be put above the drawing by `own: (panel, redraw) => control`, where
      control has a name, read() and reset() as the others have, and fill(result, p, data), which
      is called at every drawing. An example is samples.js.
      Colours are names: ink, muted, blue, vermillion, green, orange, purple.
      The file is loaded by the pages that hold such a figure; nothing else registers it.
   2. A cell of the page ends in show_explorable("NAME", data, figure, text), with a caption in its
      options as for every figure. `figure` is seen where there is no script, so it shows the
      same thing with the sliders where they start.
   3. Enter it in tests/book/explored.py, which compares `compute` with the package.

   Nothing moves by itself. The whole picture is drawn anew when a control or the width changes. */
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const here = new URL(document.currentScript.src);
  const definitions = {};

  /* ---- words and numbers ---------------------------------------------------------------- */

  /** A number with a fixed count of digits, a true minus sign and no "−0.00". */
  function fixed(x, digits = 2) {
    const text = Math.abs(x).toFixed(digits);
    return x < 0 && Number(text) !== 0 ? "−" + text : text;
  }

  /** Round numbers between two others, about `count` of them. */
  function ticks(low, high, count = 5) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++)
      found.push(i * step);
    const whole = d => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6;
    const digits = [0, 1, 2, 3, 4, 5].find(whole);
    return found.map(x => [x, fixed(x, digits)]);
  }

  /* ---- drawing -------------------------------------------------------------------------- */

  /** A new element inside `parent`. `color` and `fill` are names of colours. */
  function make(parent, tag, attributes = {}, text = "") {
    const svg = parent instanceof SVGElement || tag === "svg";
    const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === undefined) continue;
      if (svg && (key === "stroke" || key === "fill") && value !== "none")
        element.style.setProperty(key, `var(--explorable-${value})`);
      else element.setAttribute(key, value);
    }
    element.textContent = text;
    return parent.appendChild(element);
  }

  /** A pair of axes. Numbers are in units of the axes; options: color, width, dash, opacity. */
  class Panel {
    constructor(svg, box, spec) {
      Object.assign(this, {box, spec});
      this.back = make(svg, "g");
      this.inside = make(svg, "svg", {x: box.left, y: box.top, width: box.width,
                                      height: box.height, overflow: "hidden", "aria-hidden": true});
      this.front = make(svg, "g");
      this.axes();
    }

    /** Pixels of a number on the x axis, and of one on the y axis. */
    x(value) {
      const [low, high] = this.spec.x;
      return this.box.left + (value - low) / (high - low) * this.box.width;
    }

    y(value) {
      const [low, high] = this.spec.y;
      return this.box.top + (high - value) / (high - low) * this.box.height;
    }

    axes() {
      const {left, top, width, height} = this.box, {spec, back} = this;
      const marks = (given, [low, high], space) => (given || ticks(low, high, space)).map(
        mark => Array.isArray(mark) ? mark : [mark, String(mark).replace("-", "−")]);
      for (const [value, name] of marks(spec.yTicks, spec.y, height / 40)) {
        const y = this.y(value);
        make(back, "line", {x1: left, x2: left + width, y1: y, y2: y, class: "grid"});
        make(back, "text", {x: left - 6, y: y + 4, "text-anchor": "end"}, name);
      }
      for (const [value, name] of marks(spec.xTicks, spec.x, width / 60)) {
        const x = this.x(value), y = top + height;
        if (!spec.slant) make(back, "line", {x1: x, x2: x, y1: top, y2: y, class: "grid"});
        make(back, "text", spec.slant
          ? {"text-anchor": "end", transform: `translate(${x + 4} ${y + 12}) rotate(-40)`}
          : {x, y: y + 16, "text-anchor": "middle"}, name);
      }
      make(back, "path", {d: `M${left} ${top}V${top + height}H${left + width}`, class: "axis"});
      make(back, "text", {x: left - this.box.margin, y: top - 9, class: "title"}, spec.title || "");
      make(back, "text", {x: left + width, y: top + height + this.box.below - 4,
                          "text-anchor": "end"}, spec.xLabel || "");
    }

    line(points, {color = "blue", width = 2, dash, opacity} = {}) {
      const at = ([x, y]) => `${this.x(x) - this.box.left} ${this.y(y) - this.box.top}`;
      make(this.inside, "path", {d: "M" + points.map(at).join("L"), fill: "none", stroke: color,
                                 "stroke-width": width, "stroke-dasharray": dash, opacity});
    }

    /** A bar from `base` to y around each x; `width` in units of the x axis. */
    bars(points, {color = "orange", width = 0.8, base = 0, opacity} = {}) {
      for (const [x, y] of points) {
        const [high, low] = [this.y(Math.max(y, base)), this.y(Math.min(y, base))];
        const [left, right] = [this.x(x - width / 2), this.x(x + width / 2)];
        make(this.inside, "rect", {
          x: left - this.box.left, y: high - this.box.top, width: right - left,
          height: Math.max(low - high, 0.5), fill: color, opacity});
      }
    }

    /** The area between two lines: points [x, low, high]. */
    area(points, {color = "blue", opacity = 0.18} = {}) {
      const at = (x, y) => `${this.x(x) - this.box.left} ${this.y(y) - this.box.top}`;
      const back = points.map(([x, low]) => at(x, low)).reverse();
      const there = points.map(([x, , high]) => at(x, high));
      make(this.inside, "path", {d: `M${[...there, ...back].join("L")}z`, fill: color, opacity});
    }

    /** A grey band between two numbers on the x axis. */
    band(from, to) {
      make(this.inside, "rect", {x: this.x(from) - this.box.left, y: 0, height: this.box.height,
                                 width: this.x(to) - this.x(from), fill: "muted", opacity: 0.16});
    }

    /** A thin line across: `{x: number}` or `{y: number}`. */
    rule({x, y, dash}) {
      const {left, top, width, height} = this.box;
      const d = x === undefined ? `M${left} ${this.y(y)}h${width}` : `M${this.x(x)} ${top}v${height}`;
      make(this.back, "path", {d, class: "rule", "stroke-dasharray": dash});
    }

    dot(x, y, {color = "vermillion", radius = 6} = {}) {
      make(this.front, "circle", {cx: this.x(x), cy: this.y(y), r: radius, fill: color,
                                  class: "dot"});
    }

    /** An arrow from one y to another, at x. */
    arrow(x, from, to, {color = "vermillion", width = 2.5} = {}) {
      const [a, b] = [this.y(from), this.y(to)], size = Math.min(6, Math.abs(b - a));
      const back = b + (b > a ? -size : size), at = this.x(x);
      make(this.front, "path", {d: `M${at} ${a}V${back}`, stroke: color, "stroke-width": width});
      make(this.front, "path", {d: `M${at - 5} ${back}h10L${at} ${b}z`, fill: color});
    }

    text(x, y, words, {anchor = "start", dx = 0, dy = 0, color = "ink"} = {}) {
      make(this.front, "text", {x: this.x(x) + dx, y: this.y(y) + dy, "text-anchor": anchor,
                                fill: color, class: "label"}, words);
    }
  }

  /** What `draw` gets: an empty drawing, `width` pixels wide. */
  class Picture {
    constructor(svg, width) {
      Object.assign(this, {svg, width});
      svg.replaceChildren();
    }

    /** Panels side by side, or below each other where each would get less than `least` pixels or
        `columns` is 1.

        spec: x: [low, high], y: [low, high]; optional: title (stands above, names what is on the
        y axis), xLabel, xTicks and yTicks (numbers or [number, "name"]), slant: true (long names
        on the x axis), height (pixels), share (of the width, if not the same for all). */
    panels(specs, {columns = specs.length, left = 40, least = 230} = {}) {
      const beside = columns > 1 && this.width / columns >= least;
      const shares = specs.map(spec => spec.share || 1), all = shares.reduce((a, b) => a + b);
      let [x, y, bottom] = [0, 0, 0];
      const made = specs.map((spec, i) => {
        const wide = beside ? this.width * shares[i] / all : this.width;
        const longest = Math.max(...(spec.xTicks || []).map(mark => String(mark[1] ?? mark).length));
        const below = (spec.slant ? 20 + 4.4 * longest : 24) + (spec.xLabel ? 16 : 0);
        const box = {left: x + left, top: y + 26, width: wide - left - 12,
                     height: spec.height || 190, below, margin: left};
        const panel = new Panel(this.svg, box, spec);
        bottom = Math.max(bottom, box.top + box.height + below);
        if (beside) x += wide;
        else y = bottom + 6;
        return panel;
      });
      this.svg.setAttribute("height", bottom);
      this.svg.setAttribute("viewBox", `0 0 ${this.width} ${bottom}`);
      return made;
    }
  }

  /* ---- controls ------------------------------------------------------------------------- */

  /** A labelled slider or choice; returns how to read it and how to set it back. */
  function addControl(parent, control, onInput) {
    const {name, label, options, value, show = String, of = x => x} = control;
    const row = make(parent, "div", {class: "explorable-control"});
    const id = `explorable-${document.querySelectorAll(".explorable-control").length}`;
    if (control.radio) return addRadio(row, id, control, onInput);
    make(row, "label", {for: id}, label);
    const output = options ? null : make(row, "output", {for: id, "aria-live": "off"});
    const input = options ? make(row, "select", {id, name})
      : make(row, "input", {id, name, type: "range", min: control.min, max: control.max,
                            step: control.step});
    for (const option of options || []) make(input, "option", {value: option}, option);
    const read = () => options ? input.value : of(Number(input.value));
    const refresh = () => {
      if (options) return;
      output.textContent = show(read());
      input.setAttribute("aria-valuetext", output.textContent);
    };
    const reset = () => { input.value = value; refresh(); };
    input.addEventListener("input", () => { refresh(); onInput(); });
    reset();
    return {name, read, reset};
  }

  /** A choice whose options are all seen; one stop of the Tab key, as for every group of them. */
  function addRadio(row, id, {name, label, options, value}, onInput) {
    const group = make(row, "div", {class: "explorable-radio", role: "radiogroup",
                                    "aria-labelledby": id});
    make(group, "span", {id}, label);
    const inputs = options.map((option, i) => {
      const one = make(group, "label");
      const input = make(one, "input", {type: "radio", name: id, value: option});
      one.append(option);
      input.addEventListener("input", onInput);
      return input;
    });
    const reset = () => { inputs[options.indexOf(value)].checked = true; };
    reset();
    return {name, read: () => inputs.find(input => input.checked).value, reset};
  }

  const SWATCHES = {line: "M1 6H19", dash: "M1 6H19", bar: "M4 1H16V11H4z",
                    dot: "M10 1.5a4.5 4.5 0 1 0 .01 0z", arrow: "M9 12V6H5L10 0L15 6H11V12z"};

  function addLegend(parent, entries) {
    const legend = make(parent, "p", {class: "explorable-legend", "aria-hidden": "true"});
    for (const [color, kind, words] of entries) {
      const entry = make(legend, "span");
      const line = kind === "line" || kind === "dash";
      make(make(entry, "svg", {width: 20, height: 12, "aria-hidden": true}), "path", {
        d: SWATCHES[kind], "stroke-width": 2, "stroke-dasharray": kind === "dash" ? "4 3" : "none",
        [line ? "stroke" : "fill"]: color});
      entry.append(" " + words);
    }
  }

  /** Put controls, drawing and sentence in the place of the picture. */
  function start(figure) {
    const definition = definitions[figure.dataset.explorable];
    const data = JSON.parse(figure.querySelector("script").textContent);
    const panel = make(figure, "div", {class: "explorable-panel"});
    const controls = make(panel, "div", {class: "explorable-controls"});
    const own = definition.own?.(panel, () => draw(300));
    if (definition.legend) addLegend(panel, definition.legend);
    const svg = make(panel, "svg", {role: "img"});
    const sentence = make(panel, "p", {class: "explorable-sentence", "aria-live": "polite"});
    if (own) svg.before(sentence);  // it speaks of what stands above it
    let waiting = 0;
    const draw = wait => {
      const p = Object.fromEntries(made.map(control => [control.name, control.read()]));
      const result = definition.compute(p, data), words = definition.say(result, p, data);
      const width = Math.max(Math.floor(panel.clientWidth), 240);  // 0 where it is folded away
      svg.setAttribute("width", width);
      definition.draw(new Picture(svg, width), result, p, data);
      own?.fill(result, p, data);
      svg.setAttribute("aria-label", words);
      clearTimeout(waiting);  // a slider that moves is not read out at every step
      waiting = setTimeout(() => { sentence.textContent = words; }, wait);
    };
    const made = definition.controls(data).map(
      control => addControl(controls, control, () => draw(300)));
    if (own) made.push(own);
    const button = make(controls, "button", {type: "button"}, "Back to the start");
    button.addEventListener("click", () => { made.forEach(c => c.reset()); draw(300); });
    draw(0);
    figure.querySelector("img").hidden = true;
    let width = panel.clientWidth;
    new ResizeObserver(() => {
      if (panel.clientWidth === width) return;
      width = panel.clientWidth;
      draw(0);
    }).observe(panel);
  }

  /** Enter an explorable and set it up wherever the page holds one of its name. */
  function add(name, definition) {
    definitions[name] = window.Explorables[name] = definition;
    document.querySelectorAll(`[data-explorable="${name}"]`).forEach(start);
  }

  function load() {
    const names = [...document.querySelectorAll("[data-explorable]")].map(
      figure => figure.dataset.explorable);
    for (const name of new Set(names))
      make(document.head, "script", {src: new URL(`explorables/${name}.js`, here).href});
  }

  window.Explorables = {add, fixed, make, ticks};
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", load);
  else load();
})();
