/* The clipped objective of one token (rlhf_mini.ppo.policy_loss, without the minus sign). */
"use strict";

Explorables.add("clip", {
  controls: () => [
    {name: "advantage", label: "advantage A", min: -1.5, max: 1.5, step: 0.1, value: 1,
     show: x => Explorables.fixed(x, 1)},
    {name: "ratio", label: "ratio ρ", min: 0.05, max: 2, step: 0.01, value: 1.4,
     show: x => Explorables.fixed(x)},
    {name: "clip", label: "clip range ε", min: 0.05, max: 0.5, step: 0.05, value: 0.2,
     show: x => Explorables.fixed(x)},
  ],
  legend: [["blue", "line", "with the clip"], ["muted", "dash", "without"],
           ["vermillion", "dot", "this token"]],

  /** p: advantage, ratio, clip. gradient: by the token's log-probability. */
  compute({advantage, ratio, clip}) {
    const place = ratio > 1 + clip ? "above" : ratio < 1 - clip ? "below" : "inside";
    const clipped = Math.min(Math.max(ratio, 1 - clip), 1 + clip);
    const binds = (advantage > 0 && place === "above") || (advantage < 0 && place === "below");
    return {
      objective: Math.min(advantage * ratio, advantage * clipped),
      gradient: binds ? 0 : advantage * ratio, place, binds,
      number: advantage > 0 ? (binds ? 1 : 2) : advantage < 0 ? (binds ? 3 : 4) : 0,
    };
  },

  draw(picture, result, p) {
    const axes = {x: [0, 2], y: [-3, 3], xLabel: "ratio ρ"};
    const panels = picture.panels([{...axes, title: "objective"}, {...axes, title: "gradient"}]);
    const at = ratio => this.compute({...p, ratio});
    const edges = [0, 1 - p.clip, 1 + p.clip, 2];
    panels.forEach((panel, i) => {
      const key = ["objective", "gradient"][i];
      panel.band(1 - p.clip, 1 + p.clip);
      panel.rule({y: 0});
      panel.line([[0, 0], [2, 2 * p.advantage]], {color: "muted", dash: "5 4", width: 1.5});
      edges.slice(1).forEach((end, j) => {  // piece by piece: the gradient jumps
        const ends = [edges[j] + 1e-9, end - 1e-9];
        panel.line(ends.map(ratio => [ratio, at(ratio)[key]]), {width: 2.5});
      });
      panel.dot(p.ratio, result[key]);
    });
  },

  say(result, p) {
    const {fixed} = Explorables, where = {
      above: "above the clip range", below: "below the clip range", inside: "in the clip range"};
    if (!result.number) return "The advantage is 0: this token says nothing, whatever its ratio.";
    const kind = p.advantage > 0 ? "a good token" : "a bad token";
    const then = result.binds ? "; the clip binds, so the gradient is 0"
      : ` and the gradient is A times ρ, ${fixed(result.gradient)}`;
    return `Case ${result.number}: ${kind} with its ratio ${where[result.place]}; `
      + `the objective is ${fixed(result.objective)}${then}.`;
  },
});
