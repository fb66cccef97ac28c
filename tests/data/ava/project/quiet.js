// Longer than AVA's own default of ten seconds, and well.
import test from 'ava';

test('twelve quiet seconds', async t => {
	await new Promise(resolve => {
		setTimeout(resolve, 12_000);
	});
	t.pass();
});
