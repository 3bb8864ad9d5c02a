(function () {
  "use strict";
  var root = document.documentElement;
  var chips = Array.prototype.slice.call(document.querySelectorAll(".chip[data-series]"));
  var all = document.querySelector(".chip.all");
  var chosen = new Set();
  if (!chips.length || !all) return;
  root.classList.add("js");

  function show(numbers) {
    root.classList.toggle("picking", numbers.size > 0);
    document.querySelectorAll(".plot [data-series], .summary tr[data-series]").forEach(function (part) {
      part.classList.toggle("picked", numbers.has(part.dataset.series));
    });
  }

  function update() {
    chips.forEach(function (chip) {
      chip.setAttribute("aria-pressed", String(chosen.has(chip.dataset.series)));
    });
    all.hidden = chosen.size === 0;
    show(chosen);
  }

  chips.forEach(function (chip) {
    var number = chip.dataset.series;
    chip.addEventListener("click", function () {
      if (!chosen.delete(number)) chosen.add(number);
      update();
    });
  });
  all.addEventListener("click", function () {
    chosen.clear();
    update();
    chips[0].focus();
  });
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape" && chosen.size) {
      chosen.clear();
      update();
    }
  });
})();
