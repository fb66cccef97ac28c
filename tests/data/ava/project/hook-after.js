// A failed hook whose own title tells nothing.
import test from 'ava';

test.after.always('put it all away', () => {
	throw new Error('drawer is full');
});
test('works', t => t.pass());
test('works too', t => t.pass());
