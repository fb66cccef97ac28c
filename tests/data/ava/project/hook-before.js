// A failed before hook: no test runs, after.always does.
import test from 'ava';

test.before(() => {
	throw new Error('no database');
});
test.after.always('sweep', t => {
	t.log('swept');
});
test('first', t => t.pass());
test('second', t => t.pass());
test.skip('third', t => t.pass());
