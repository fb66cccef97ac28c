import test from 'ava';

test('same', t => t.pass());
test.skip('beta', t => t.pass());
test.before(() => {});
