/* Recorded responses through the steps of PPO, token by token (benchmarks/samples.py).

   data: steps; start (place of a prompt); prompts, each with family, prompt and responses, one per
   step: tokens, logprobs, ref_logprobs, values, advantages, score, gold. */
"use strict";

(() => {
  const {fixed, make} = Explorables;
  // The number that colours a token; full colour where it is that large.
  const VIEWS = {
    "KL term": {of: token => token.term, full: 1, low: "−1 or less: rarer than in SFT",
                high: "1 or more: likelier"},
    "log-probability": {of: token => token.logprob, full: 3, low: "−3 or less: a surprise",
                        high: "0: certain"},
    "advantage": {of: token => token.advantage, full: 3, low: "−3 or less: worse than expected",
                  high: "3 or more: better"},
  };
  const title = ({family, prompt}) => `${family}: ${prompt}`;

  /** A row of tokens, one of which is picked by pointer or by arrow keys. */
  function addTokens(panel, redraw) {
    const head = make(panel, "p", {class: "explorable-head"});
    const box = make(panel, "div", {class: "explorable-tokens", role: "listbox",
                                    "aria-label": "Tokens of the response",
                                    "aria-orientation": "horizontal"});
    const scale = make(panel, "p", {class: "explorable-scale", "aria-hidden": true});
    let place = 0;
    const tint = (element, shade) => {
      element.classList.add(shade < 0 ? "explorable-below" : "explorable-above");
      element.style.setProperty("--shade", Math.min(Math.abs(shade), 1));
      return element;
    };
    const pick = to => {
      if (to === place || !box.children[to]) return;
      place = to;
      redraw();
    };
    box.addEventListener("keydown", event => {
      const to = {ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0,
                  End: box.children.length - 1}[event.key];
      if (to === undefined) return;
      event.preventDefault();
      pick(to);
    });
    for (const kind of ["pointerover", "click", "focusin"])
      box.addEventListener(kind, event => pick([...box.children].indexOf(
        event.target.closest("[role=option]"))));

    function fill(result, p, data) {
      const view = VIEWS[p.view], focused = box.contains(document.activeElement);
      place = result.place;
      head.textContent = data.prompts.find(row => title(row) === p.prompt).prompt;
      box.replaceChildren();
      result.tokens.forEach((token, i) => {
        const option = make(box, "span", {role: "option", "aria-selected": i === place,
                                          tabindex: i === place ? 0 : -1});
        make(tint(option, view.of(token) / view.full), "span", {}, token.text);
        make(option, "small", {}, fixed(view.of(token)));
      });
      if (focused) box.children[place].focus({preventScroll: true});
      scale.replaceChildren(view.low + " ");
      const swatches = make(scale, "span");
      for (const shade of [-1, -0.5, 0, 0.5, 1])
        if (shade <= 0 || p.view !== "log-probability") tint(make(swatches, "i"), shade);
      scale.append(" " + view.high);
    }
    return {name: "token", read: () => place, reset: () => { place = 0; }, fill};
  }

  Explorables.add("samples", {
    controls: ({prompts, start, steps}) => [
      {name: "prompt", label: "prompt", options: prompts.map(title), value: title(prompts[start])},
      {name: "step", label: "PPO step", min: 0, max: steps.length - 1, step: 1,
       value: steps.length - 1, of: place => steps[place]},
      {name: "view", label: "colour", options: Object.keys(VIEWS), value: "KL term", radio: true},
    ],
    own: addTokens,

    /** p: prompt, step, token. kl of a response is the sum of its tokens' terms. */
    compute(p, data) {
      const {responses} = data.prompts.find(row => title(row) === p.prompt);
      const sum = terms => terms.reduce((a, b) => a + b, 0);
      const terms = response => response.logprobs.map((x, i) => x - response.ref_logprobs[i]);
      const now = data.steps.indexOf(p.step), response = responses[now];
      const term = terms(response);
      return {
        now, place: Math.min(p.token, term.length - 1),
        score: responses.map(r => r.score), gold: responses.map(r => r.gold),
        kl: responses.map(r => sum(terms(r))),
        tokens: response.tokens.map((text, i) => ({
          text, term: term[i], logprob: response.logprobs[i], ref: response.ref_logprobs[i],
          value: response.values[i], advantage: response.advantages[i]})),
      };
    },

    draw(picture, result, p, {steps}) {
      const axes = {x: [-0.3, steps.length - 0.7], height: 90, xLabel: "PPO step",
                    xTicks: steps.map((step, i) => [i, String(step)])};
      const panels = picture.panels([
        {...axes, title: "score of the response", y: [-4, 6], yTicks: [-4, 0, 4]},
        {...axes, title: "gold", y: [-0.06, 1.1], yTicks: [0, 0.5, 1]},
        {...axes, title: "KL, nats", y: [-4, 7], yTicks: [-4, 0, 4]},
      ], {least: 190, left: 30});
      panels.forEach((panel, i) => {
        const values = [result.score, result.gold, result.kl][i];
        panel.line(values.map((y, x) => [x, y]));
        values.forEach((y, x) => panel.dot(x, y, {color: "blue", radius: 3.5}));
        panel.dot(result.now, values[result.now]);
      });
    },

    say(result, p) {
      const at = result.now, token = result.tokens[result.place];
      return `After step ${p.step} the response has score ${fixed(result.score[at])}, gold `
        + `${fixed(result.gold[at])} and KL ${fixed(result.kl[at])}. Token ${result.place + 1}, `
        + `“${token.text.trim()}”: log-probability ${fixed(token.logprob)}, `
        + `${fixed(token.ref)} under the reference, so a KL term of ${fixed(token.term)}; value `
        + `${fixed(token.value)}, advantage ${fixed(token.advantage)}.`;
    },
  });
})();
