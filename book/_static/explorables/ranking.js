/* Bradley-Terry and the K-way loss of one prompt (rlhf_mini.reward.reward_loss).

   data: names, in the order of the labeler, best first; scores, where the sliders start. */
"use strict";

Explorables.add("ranking", {
  controls: data => [
    ...data.names.map((name, i) => (
      {name: `score${i}`, label: `score of ${name}`, min: -3, max: 3, step: 0.1,
       value: data.scores[i], show: x => Explorables.fixed(x, 1)})),
    {name: "shift", label: "added to all", min: -2, max: 2, step: 0.1, value: 0,
     show: x => Explorables.fixed(x, 1)},
  ],
  legend: [["blue", "dot", "score"], ["vermillion", "arrow", "push: minus the gradient"],
           ["green", "bar", "pair in the labeler's order"], ["orange", "bar", "pair turned round"]],

  /** p: score0, score1, ..., shift. pairs: [winner, loser, probability], by index. */
  compute(p, data) {
    const scores = data.names.map((_, i) => p[`score${i}`] + p.shift);
    const pairs = [], gradient = scores.map(() => 0);
    let loss = 0;
    scores.forEach((winner, i) => scores.forEach((loser, j) => {
      if (j <= i) return;
      const margin = winner - loser, small = Math.exp(-Math.abs(margin));  // never overflows
      const wrong = (margin > 0 ? small : 1) / (1 + small);
      pairs.push([i, j, (margin > 0 ? 1 : small) / (1 + small)]);
      loss += Math.log1p(small) + Math.max(-margin, 0);
      gradient[i] -= wrong;
      gradient[j] += wrong;
    }));
    const mean = x => x / pairs.length;
    return {scores, pairs, loss: mean(loss), gradient: gradient.map(mean)};
  },

  draw(picture, {scores, pairs, gradient}, p, {names}) {
    const {fixed} = Explorables;
    const [left, right] = picture.panels([
      {title: "score, and its gradient", x: [-0.6, names.length - 0.4], y: [-6.5, 6.5],
       yTicks: [-6, -3, 0, 3, 6], xTicks: names.map((name, i) => [i, name]), xLabel: "response, best first"},
      {title: "probability of the labeler's order", x: [-0.6, pairs.length - 0.4], y: [0, 1.1],
       yTicks: [0, 0.5, 1], xLabel: "pair",
       xTicks: pairs.map(([i, j], k) => [k, `${names[i]}≻${names[j]}`])},
    ]);
    left.rule({y: 0});
    scores.forEach((score, i) => {
      const rim = -0.4 * Math.sign(gradient[i]), end = score + rim - 12 * gradient[i];
      left.arrow(i, score + rim, Math.min(Math.max(end, -6.4), 6.4));
      left.dot(i, score, {color: "blue"});
      left.text(i, score, fixed(gradient[i]), {anchor: "middle", dy: gradient[i] < 0 ? 20 : -11});
    });
    pairs.forEach(([, , chance], k) => {
      right.bars([[k, chance]], {color: chance < 0.5 ? "orange" : "green"});
      right.text(k, chance, fixed(chance), {anchor: "middle", dy: -4});
    });
    right.rule({y: 0.5, dash: "4 3"});
  },

  say({pairs, loss, gradient}, p, {names}) {
    const {fixed} = Explorables;
    const wrong = pairs.filter(pair => pair[2] < 0.5).map(([i, j]) => `${names[i]} over ${names[j]}`);
    const sizes = gradient.map(Math.abs), most = sizes.indexOf(Math.max(...sizes));
    const push = sizes[most] < 0.005 ? "hardly any score is pushed"
      : `the strongest push moves ${names[most]} ${gradient[most] < 0 ? "up" : "down"}`;
    return `The loss is ${fixed(loss, 3)} nats per pair; ` + (wrong.length
      ? `the scores doubt ${wrong.join(", ")}` : "no pair is turned round") + `; ${push}.`;
  },
});
