const find = (id) => document.getElementById(id), isShown = (element) => element && element.offsetParent;
const keys = {a: "vote-a", b: "vote-b", t: "vote-t", s: "vote-s", u: "undo", Escape: "stop"};
document.addEventListener("keydown", ({key, target, ctrlKey, altKey, metaKey, repeat}) => {
    const isTyping = target.closest("input, textarea") && key !== "Escape";
    if (isTyping || ctrlKey || altKey || metaKey || repeat || !isShown(find(keys[key]))) return;
    find(keys[key]).click();
});
// after an answer, the keys of the vote must reach the page, and else the next question its box
window.focusNext = () => isShown(find("vote-a")) ? document.activeElement.blur()
    : document.querySelector("#question textarea").focus();
let isAtEnd = true;                          // the newest answer stays in sight, unless the reader scrolls up
document.addEventListener("scroll", ({target: {id, scrollHeight, scrollTop, clientHeight}}) => {
    if (id === "talk") isAtEnd = scrollHeight - scrollTop - clientHeight < 40; }, true);
new MutationObserver(() => { if (isAtEnd && find("talk")) find("talk").scrollTop = 1e9; })
    .observe(document, {subtree: true, childList: true, characterData: true});
