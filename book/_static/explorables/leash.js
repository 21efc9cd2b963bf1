/* The optimum under a KL penalty over its coefficient (eq-optimum of chapter 8).

   data: names of the answers, ref (probabilities), scores; reached: [beta, KL, mean score] of
   policies that PPO has found. */
"use strict";

Explorables.add("leash", {
  controls: () => [
    {name: "beta", label: "coefficient β", min: -1.3, max: 1.5, step: 0.05, value: -0.3,
     of: x => 10 ** x, show: x => Explorables.fixed(x, x < 1 ? 2 : 1)},
  ],
  legend: [["muted", "bar", "reference"], ["green", "bar", "optimum"],
           ["blue", "line", "best mean score for a KL"], ["muted", "dot", "ends of PPO"],
           ["vermillion", "dot", "the optimum for this β"]],

  /** p: beta. */
  compute({beta}, {ref, scores}) {
    const logits = ref.map((q, i) => Math.log(q) + scores[i] / beta);
    const top = Math.max(...logits);
    const logZ = top + Math.log(logits.reduce((sum, x) => sum + Math.exp(x - top), 0));
    const optimum = logits.map(x => Math.exp(x - logZ));
    const mean = values => optimum.reduce((sum, p, i) => sum + p * values[i], 0);
    const kl = mean(logits.map((x, i) => x - logZ - Math.log(ref[i]))), score = mean(scores);
    return {optimum, logZ, kl, score, objective: score - beta * kl};
  },

  draw(picture, {optimum, kl, score}, p, data) {
    const {names, ref, scores, reached} = data;
    const ends = [...Array(141).keys()].map(i => this.compute({beta: 10 ** (-1.5 + i / 40)}, data));
    const most = Math.max(...ends.map(end => end.kl));
    const [left, right] = picture.panels([
      {title: "probability; above the bars: the score", x: [-0.6, names.length - 0.4], y: [0, 1.1],
       slant: true, height: 210, yTicks: [0, 0.25, 0.5, 0.75, 1],
       xTicks: names.map((name, i) => [i, name])},
      {title: "mean score", x: [0, most * 1.05], xLabel: "KL from the reference, nats", height: 210,
       y: [Math.min(ends[140].score, 0) - 0.1, Math.max(...scores) + 0.1]},
    ], {left: 56});
    left.bars(ref.map((q, i) => [i - 0.2, q]), {color: "muted", width: 0.36});
    left.bars(optimum.map((q, i) => [i + 0.2, q]), {color: "green", width: 0.36});
    names.forEach((name, i) => left.text(i, Math.max(ref[i], optimum[i]),
      Explorables.fixed(scores[i], 1), {anchor: "middle", dy: -5}));
    right.line(ends.map(end => [end.kl, end.score]));
    // the price: the tangent in the dot has the slope beta
    right.line([-1, 1].map(d => [kl + d, score + d * p.beta]),
               {color: "vermillion", dash: "5 4", width: 1.5});
    for (const [, x, y] of reached) right.dot(x, y, {color: "muted", radius: 4});
    right.dot(kl, score);
  },

  say({optimum, kl, score}, p, {names}) {
    const {fixed} = Explorables, best = optimum.indexOf(Math.max(...optimum));
    return `At β = ${fixed(p.beta, p.beta < 1 ? 2 : 1)} the optimum is ${fixed(kl)} nats from the `
      + `reference with a mean score of ${fixed(score)}; its most likely answer is `
      + `“${names[best].replace(/[.]$/, "")}”, with probability ${fixed(optimum[best])}.`;
  },
});
