// A worker thread that eats its memory up.
import test from 'ava';

test.serial('done before', t => t.pass());
test.serial('eats', () => {
	const all = [];
	for (;;) {
		all.push(Array.from({length: 1e5}, (_, i) => ({i})));
	}
});
