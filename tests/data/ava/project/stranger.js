// Knows nothing of AVA.
export default 1;
