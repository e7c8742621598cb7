# What a handler does outside its transaction is not exact: what it does within is
# rolled back with the batch, the rest stays and is done again.  And what tells
# keys: an error of the handler does, in the log, without its doing.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('outside');
my $connection = $node->connstr($db) =~ s/'/''/gr;

$node->safe_psql($db, qq{
	CREATE EXTENSION dblink;
	CREATE SEQUENCE calls;
	CREATE TABLE outside (key text, n bigint);
	CREATE TABLE inside (key text, n bigint);
	CREATE TABLE totals (key text PRIMARY KEY, n bigint CONSTRAINT small CHECK (n < 1000));
	CREATE FUNCTION store(key text, n bigint) RETURNS void LANGUAGE plpgsql AS \$\$
	BEGIN
		PERFORM nextval('calls');
		PERFORM dblink_exec('$connection', format('INSERT INTO outside VALUES (%L, %s)', key, n));
		INSERT INTO inside VALUES (key, n);
		INSERT INTO totals VALUES (key, n);
	END
	\$\$;
	CREATE FOREIGN TABLE hits (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '10ms', backoff '10ms');
	SELECT sb_increment('a key', 5000, 'hits')});
wait_for($node, $db, 'SELECT last_value >= 3 FROM calls', 'a handler fails three times');
wait_for($node, $db, 'SELECT count(*) >= 3 FROM outside', 'what it does by a connection of its own stays, each time');
is($node->safe_psql($db, 'SELECT count(*) FROM inside'), 0, 'what it does in its transaction does not');
ok(lines_in_log($node, 'DETAIL:  Failing row contains \(a key, 5000\)'), 'the log has the key, in the detail of the error');

$node->safe_psql($db, 'ALTER TABLE totals DROP CONSTRAINT small');
is($node->safe_psql($db, q{SELECT sb_drain('hits')}), 't', 'the handler succeeds');
is($node->safe_psql($db, 'SELECT (SELECT sum(n) FROM inside), (SELECT sum(n) FROM totals)'), '5000|5000',
	'in its transaction the count is stored once');
ok($node->safe_psql($db, 'SELECT sum(n) >= 4 * 5000 FROM outside') eq 't', 'outside more often');

$node->stop;
done_testing();
