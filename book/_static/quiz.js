// Says which choices are explained, and counts the right ones. Nothing is kept.
"use strict";
for (const quiz of document.querySelectorAll(".quiz")) {
  const score = document.createElement("p");
  score.className = "quiz-score";
  score.setAttribute("role", "status");
  quiz.querySelector(".quiz-key").before(score);
  const count = () => {
    const right = quiz.querySelectorAll("input[value=right]:checked").length;
    const all = quiz.querySelectorAll("fieldset").length;
    score.textContent = `Score: ${right} of ${all}`;
  };
  quiz.addEventListener("change", event => {
    for (const other of event.target.closest("fieldset").querySelectorAll("input"))
      other.removeAttribute("aria-describedby");
    event.target.setAttribute("aria-describedby", `${event.target.id}-why`);
    count();
  });
  count();
}
