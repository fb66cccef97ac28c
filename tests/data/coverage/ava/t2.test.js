import test from 'ava';
import {inChild, inThread} from './src/child.js';

test('in a child', t => t.is(inChild('hello'), 'child hello'));
test('in a thread', async t => t.is(await inThread('hello'), 0));
