// Much of everything: output, a line, a difference, a log, a message.
import test from 'ava';

test.serial('four mebibytes of output', t => {
	for (let i = 0; i < 4096; i++) {
		console.log('y'.repeat(1023));
	}

	t.pass();
});
test.serial('a line of one mebibyte', t => {
	t.log('z'.repeat(1024 * 1024));
	t.fail('m'.repeat(1024 * 1024));
});
test.serial('a difference of 20,000 items', t => {
	t.deepEqual(
		Array.from({length: 20_000}, (_, i) => i),
		Array.from({length: 20_000}, (_, i) => i + 1),
	);
});
