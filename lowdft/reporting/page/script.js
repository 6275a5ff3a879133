"use strict";
const boxes = [...document.querySelectorAll("#runs input")], folds = [...document.querySelectorAll("details")];
const nameOf = (fold) => fold.parentElement.firstElementChild.textContent + "\n" + fold.firstElementChild.textContent;
function show(box) { document.body.classList.toggle("off" + box.value, !box.checked); }
function remember() {  // for the page of a running training, which reloads itself
  const open = folds.filter((fold) => fold.open).map(nameOf), off = boxes.filter((box) => !box.checked).map((box) => box.value);
  history.replaceState({open, off}, "");
}
for (const box of boxes) {
  if (history.state?.off.includes(box.value)) { box.checked = false; show(box); }
  box.addEventListener("change", () => { show(box); remember(); });
}
for (const fold of folds) {
  if (history.state?.open.includes(nameOf(fold))) { fold.open = true; }
  fold.addEventListener("toggle", remember);
}
for (const choice of document.querySelectorAll("#filter input")) {
  choice.addEventListener("change", () => {
    for (const article of document.querySelectorAll("#samples article")) {
      article.hidden = choice.value !== "" && !article.dataset.outcome.split(" ").includes(choice.value);
    }
  });
}
