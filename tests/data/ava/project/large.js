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
test.serial('a log of two mebibytes, forty calls', t => {
	for (let i = 0; i < 40; i++) {
		t.log('l'.repeat(50_000));
	}

	t.pass();
});
test.serial('control characters, which take six bytes each', t => {
	t.log('\u0001'.repeat(1024 * 1024));
	t.is('\u0001'.repeat(1024 * 1024), 'y', '\u0002'.repeat(1024 * 1024));
});
test.serial('an output of two mebibytes at once', t => {
	process.stdout.write('o'.repeat(2 * 1024 * 1024));
	t.pass();
});
