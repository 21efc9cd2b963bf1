/* Generalised advantage estimation over one response (rlhf_mini.advantages.compute_gae).

   data: tokens, and for each its reward and the value before it; lambda and token, where the
   sliders start. Token t of the formulas is tokens[t - 1]. */
"use strict";

Explorables.add("gae", {
  controls: data => [
    {name: "lambda", label: "λ", min: 0, max: 1, step: 0.01, value: data.lambda,
     show: x => Explorables.fixed(x)},
    {name: "gamma", label: "γ", min: 0.8, max: 1, step: 0.01, value: 1,
     show: x => Explorables.fixed(x)},
    {name: "token", label: "token", min: 1, max: data.tokens.length, step: 1,
     value: data.token, show: t => `${t}, “${data.tokens[t - 1].trim()}”`},
  ],
  legend: [["orange", "bar", "advantage"], ["blue", "line", "value"], ["green", "dash", "return"],
           ["purple", "bar", "weight of an estimator"]],

  /** p: lambda, gamma, token. estimates and weights: of the n-step estimators of that token. */
  compute({lambda, gamma, token}, {rewards, values}) {
    const count = rewards.length, advantages = Array(count).fill(0);
    for (let t = count - 1, next = 0; t >= 0; t--) {
      const delta = rewards[t] + gamma * (t + 1 < count ? values[t + 1] : 0) - values[t];
      advantages[t] = next = delta + gamma * lambda * next;
    }
    const t = token - 1, left = count - t, weights = [], estimates = [];
    for (let n = 1, sum = 0; n <= left; n++) {
      sum += gamma ** (n - 1) * rewards[t + n - 1];
      const after = t + n < count ? values[t + n] : 0;
      estimates.push(sum + gamma ** n * after - values[t]);
      weights.push((n < left ? 1 - lambda : 1) * lambda ** (n - 1));
    }
    return {advantages, returns: advantages.map((a, i) => a + values[i]), weights, estimates};
  },

  draw(picture, {advantages, returns, weights, estimates}, p, {tokens, rewards, values}) {
    const sums = rewards.map((_, t) => rewards.slice(t).reduce((a, b) => a + b, 0));
    const all = [...values, ...rewards, ...sums, ...sums.map((g, t) => g - values[t]), 0];
    const [low, high] = [Math.min(...all), Math.max(...all)], room = 0.15 * (high - low);
    const x = [-0.6, tokens.length - 0.4], at = p.token - 1;
    const [top, bottom] = picture.panels([
      {title: "score units", x, y: [low - room, high + room], slant: true, height: 200,
       xTicks: tokens.map((token, t) => [t, token.trim()])},
      {title: `weights of the n-step estimators, token ${p.token}`, x: [0.4, tokens.length + 0.6],
       y: [0, 1.15], yTicks: [0, 0.5, 1], xLabel: "n, steps before the critic is asked", height: 110,
       xTicks: weights.map((_, i) => i + 1)},
    ], {columns: 1});
    top.rule({y: 0});
    top.band(at - 0.5, at + 0.5);
    top.bars(advantages.map((a, t) => [t, a]));
    top.line(returns.map((r, t) => [t, r]), {color: "green", dash: "5 4"});
    top.line(values.map((v, t) => [t, v]));
    values.forEach((v, t) => top.dot(t, v, {color: "blue", radius: 4}));
    bottom.bars(weights.map((w, i) => [i + 1, w]), {color: "purple"});
    weights.forEach((w, i) => bottom.text(i + 1, w, w < 0.1 ? "" : Explorables.fixed(w),
      {anchor: "middle", dy: -4}));
  },

  say({advantages, returns, weights}, p, {tokens}) {
    const {fixed} = Explorables, t = p.token - 1;
    const sizes = advantages.map(Math.abs), most = sizes.indexOf(Math.max(...sizes));
    return `With λ = ${fixed(p.lambda)} and γ = ${fixed(p.gamma)} token ${p.token}, `
      + `“${tokens[t].trim()}”, has the advantage ${fixed(advantages[t])} and the return `
      + `${fixed(returns[t])}; looking to the end has the weight ${fixed(weights.at(-1))}; `
      + `the advantage furthest from 0, ${fixed(advantages[most])}, is that of “${tokens[most].trim()}”.`;
  },
});
