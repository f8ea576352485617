// Words that light up while they are heard, and what tokens and words say when they are chosen. Gradio puts new HTML
// into the page at any time, so everything is listened for on the document.
(() => {
  const words = (audio) => audio.closest(".mm-sound").querySelectorAll(".mm-said span[data-start]");
  const light = (audio) => {
    const now = audio.currentTime;
    for (const word of words(audio)) {
      const isSaid = !audio.ended && now >= word.dataset.start && now < word.dataset.end;
      word.classList.toggle("mm-lit", isSaid && (now > 0 || !audio.paused));
    }
  };
  const follow = (audio) => {
    light(audio);
    if (audio.isConnected && !audio.paused && !audio.ended) requestAnimationFrame(() => follow(audio));
  };
  const isOurs = (audio) => audio instanceof HTMLAudioElement && audio.closest(".mm-sound");
  const sentences = () => [...document.querySelectorAll(".mm-sentence audio")];

  // Media events don't bubble; listeners that capture get them all the same.
  document.addEventListener("play", (event) => {
    if (!isOurs(event.target)) return;
    for (const other of document.querySelectorAll(".mm-sound audio")) if (other !== event.target) other.pause();
    follow(event.target);
  }, true);
  for (const name of ["seeked", "pause", "ended"])
    document.addEventListener(name, (event) => isOurs(event.target) && light(event.target), true);

  // Sentences are played one after the other; one that isn't there yet is waited for.
  let isWaiting = false;
  document.addEventListener("ended", (event) => {
    if (!isOurs(event.target) || !event.target.closest(".mm-sentence")) return;
    const all = sentences();
    const next = all[all.indexOf(event.target) + 1];
    if (next) next.play();
    else isWaiting = event.target.closest("[data-more]") !== null;
  }, true);
  new MutationObserver(() => {
    for (const audio of sentences()) {
      if (audio.dataset.known) continue;
      audio.dataset.known = "yes";
      const all = sentences();
      if (all.indexOf(audio) === 0 || isWaiting) {
        isWaiting = false;
        audio.play().catch(() => {}); // a browser that plays nothing by itself leaves it to the button
      }
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  const choose = (button) => {
    for (const other of button.parentElement.querySelectorAll("button"))
      other.setAttribute("aria-pressed", String(other === button));
    const part = button.closest(".mm-part");
    const info = part.querySelector(".mm-info");
    if (info) info.textContent = button.dataset.info;
    if (button.dataset.heat) {
      const heats = button.dataset.heat.split(" ");
      part.querySelectorAll(".mm-heat").forEach((image, number) => (image.src = heats[number]));
    }
  };
  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element)) return;
    const button = event.target.closest(".mm-tokens button, .mm-looks button");
    if (button) choose(button);
    const word = event.target.closest(".mm-said span[data-start]");
    if (word) {
      const audio = word.closest(".mm-sound").querySelector("audio");
      audio.currentTime = Number(word.dataset.start);
      audio.play();
    }
  });
})();
