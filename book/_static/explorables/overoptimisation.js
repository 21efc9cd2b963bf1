/* Score and gold over the KL, for best of n and PPO (rlhf_mini.experiments.overoptimisation).

   data: kl, the distances to stop at; sizes, [KL, n] of best of n; models, by name: by method
   ("best of n", "PPO") one path per seed, each with kl, score and gold. */
"use strict";

(() => {
  const {fixed} = Explorables;
  const METHODS = {"best of n": {color: "blue"}, "PPO": {color: "vermillion", dash: "6 3"}};
  // Student's t at 97.5 %, by the number of seeds from 2 on.
  const T = [12.7062047362, 4.3026527297, 3.1824463053, 2.7764451052, 2.5705818356, 2.4469118511,
             2.3646242516, 2.3060041352, 2.2621571628];
  const signed = x => (x > 0 ? "+" : "") + fixed(x);

  /** Change since the start where a path first passes a KL; the start is its first point. */
  function changeAt(path, column, kl) {
    const y = path[column], x = path.kl, next = x.findIndex(distance => distance >= kl);
    if (next < 0) return null;
    if (next === 0) return 0;
    const share = (kl - x[next - 1]) / (x[next] - x[next - 1]);
    return y[next - 1] + share * (y[next] - y[next - 1]) - y[0];
  }

  /** Mean and 95 % interval over seeds, or null where a seed did not get so far. */
  function change(paths, column, kl) {
    const values = paths.map(path => changeAt(path, column, kl));
    if (values.includes(null)) return null;
    const mean = values.reduce((a, b) => a + b) / values.length;
    const squares = values.reduce((all, x) => all + (x - mean) ** 2, 0);
    const half = T[values.length - 2] * Math.sqrt(squares / (values.length - 1) / values.length);
    return {mean, low: mean - half, high: mean + half};
  }

  Explorables.add("overoptimisation", {
    controls: ({kl, models}) => [
      {name: "model", label: "reward model learned from", options: Object.keys(models),
       value: Object.keys(models)[0]},
      {name: "kl", label: "KL, nats", min: 0, max: kl.length - 1, step: 1,
       value: kl.findIndex(x => x >= 1), of: place => kl[place], show: x => fixed(x)},
    ],
    legend: [["blue", "line", "best of n"], ["vermillion", "dash", "PPO"]],

    /** By method: score and gold at each KL, the place of the highest gold, and the place now. */
    compute({model, kl}, data) {
      return {now: data.kl.indexOf(kl), methods: Object.fromEntries(
        Object.entries(data.models[model]).map(([method, paths]) => {
          const [score, gold] = ["score", "gold"].map(
            column => data.kl.map(x => change(paths, column, x)));
          const means = gold.map(point => point ? point.mean : -Infinity);
          return [method, {score, gold, peak: means.indexOf(Math.max(...means))}];
        }))};
    },

    draw(picture, {now, methods}, p, {kl, sizes}) {
      const root = kl.map(Math.sqrt), end = root[root.length - 1];
      const axes = {x: [0, end], xLabel: "KL in nats, axis by its square root",
                    xTicks: [0, 0.25, 1, 2, 4, 6, 9].map(x => [Math.sqrt(x), String(x)])};
      const panels = picture.panels([
        {...axes, title: "score, change", y: [-0.1, 1.2], yTicks: [0, 0.5, 1]},
        {...axes, title: "gold, change", y: [-0.25, 0.15], yTicks: [-0.2, -0.1, 0, 0.1]}]);
      panels.forEach((panel, i) => {
        panel.rule({y: 0});
        panel.rule({x: root[now], dash: "3 3"});
        for (const [method, result] of Object.entries(methods)) {
          const column = i ? result.gold : result.score, look = METHODS[method];
          const there = root.map((x, j) => [x, column[j]]).filter(([, point]) => point);
          panel.area(there.map(([x, {low, high}]) => [x, low, high]), {color: look.color});
          panel.line(there.map(([x, {mean}]) => [x, mean]), look);
          if (method !== "PPO") {
            there.filter(([x]) => sizes.some(([distance]) => Math.sqrt(distance) === x)).forEach(
              ([x, {mean}]) => panel.dot(x, mean, {color: look.color, radius: 3}));
          }
          if (i) panel.rule({x: root[result.peak], dash: "1 3"});
          if (column[now]) panel.dot(root[now], column[now].mean, {color: look.color});
        }
      });
    },

    say({now, methods}, p, {kl, sizes}) {
      const interval = ({mean, low, high}) => `${signed(mean)} [${fixed(low)}, ${fixed(high)}]`;
      const found = Object.entries(methods).map(([method, {score, gold}]) => gold[now]
        ? `${method} has moved the score by ${interval(score[now])} `
          + `and gold by ${interval(gold[now])}` : `${method} has not got so far in every seed`);
      const peaks = Object.entries(methods).map(([method, {peak}]) => {
        const [, n] = method === "PPO" ? [] : sizes.find(([distance]) => distance === kl[peak]);
        return `at ${fixed(kl[peak])} nats for ${method}${n ? ` (n = ${n})` : ""}`;
      });
      return `At ${fixed(p.kl)} nats ${found.join("; ")}. `
        + `Gold is highest ${peaks.join(" and ")}.`;
    },
  });
})();
