"use strict";
for (const box of document.querySelectorAll("#runs input")) {
  box.addEventListener("change", () => document.body.classList.toggle("off" + box.value, !box.checked));
}
for (const choice of document.querySelectorAll("#filter input")) {
  choice.addEventListener("change", () => {
    for (const article of document.querySelectorAll("#samples article")) {
      article.hidden = choice.value !== "" && !article.dataset.outcome.split(" ").includes(choice.value);
    }
  });
}
