# Triggers that count the rows of a table: what is stored is what there is,
# after a million rows were copied in and after sessions that changed and
# rolled back at the same time.  Triggers are dumped and restored, count what
# logical replication brings, and cannot be part of a prepared transaction.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('trigger',
	'wal_level = logical',
	'max_wal_senders = 4',
	'max_prepared_transactions = 2');

# A table that is counted twice: by a trigger for each row, and by triggers
# for each statement.  Handlers add the counts up.
$node->safe_psql($db, q{
	CREATE SCHEMA app;
	CREATE TABLE app.likes (id int PRIMARY KEY, post_id int, note text);
});
for my $kind ('row', 'statement')
{
	$node->safe_psql($db, qq{
		CREATE TABLE app.stored_by_$kind (post_id int UNIQUE NULLS NOT DISTINCT, n bigint NOT NULL);
		CREATE FUNCTION app.store_by_$kind(posts int[], counters bigint[]) RETURNS void LANGUAGE sql AS \$\$
			INSERT INTO app.stored_by_$kind AS s SELECT * FROM unnest(posts, counters)
			ON CONFLICT (post_id) DO UPDATE SET n = s.n + EXCLUDED.n
		\$\$;
		CREATE FOREIGN TABLE app.by_$kind (post_id int, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'app.store_by_$kind', interval '20ms', timeout '1h');
	});
}
$node->safe_psql($db, q{
	CREATE TRIGGER each AFTER INSERT OR UPDATE OR DELETE ON app.likes
		FOR EACH ROW EXECUTE FUNCTION sb_trigger('app.by_row', 'post_id');
	CREATE TRIGGER all_in AFTER INSERT ON app.likes REFERENCING NEW TABLE AS came
		FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('app.by_statement', 'post_id');
	CREATE TRIGGER all_up AFTER UPDATE ON app.likes REFERENCING OLD TABLE AS gone NEW TABLE AS came
		FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('app.by_statement', 'post_id');
	CREATE TRIGGER all_out AFTER DELETE ON app.likes REFERENCING OLD TABLE AS gone
		FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('app.by_statement', 'post_id');
});

# Everything is stored, and stored are the rows that there are.
sub is_exact
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for my $kind ('row', 'statement')
	{
		is($node->safe_psql($db, qq{
			SELECT sb_drain('app.by_$kind');
			SELECT post_id, sum(n) FROM (
				SELECT * FROM app.stored_by_$kind UNION ALL
				SELECT post_id, -1 FROM app.likes) s
			GROUP BY post_id HAVING sum(n) <> 0 ORDER BY post_id}),
			't', "$what, by $kind");
	}
}

# A million rows, some of them without a post.
my $file = PostgreSQL::Test::Utils::tempdir() . '/million';
open my $rows, '>', $file or die "$file: $!";
for my $id (1 .. 1_000_000)
{
	print $rows $id, "\t", $id % 17 ? $id * 7919 % 1000 : '\N', "\tx\n";
}
close $rows;
$node->safe_psql($db, qq{COPY app.likes FROM '$file'});
unlink $file;
is($node->safe_psql($db, 'SELECT count(*) FROM app.likes'), '1000000',
	'a million rows are copied in');
is_exact('and counted');

# Most of them go again, in one statement that is rolled back, and in one that
# is not.
$node->safe_psql($db, q{
	BEGIN;
	DELETE FROM app.likes WHERE id > 1000;
	ROLLBACK;
	DELETE FROM app.likes WHERE id > 1000;
});
is_exact('rows that go are counted down');

# Sessions change few rows at the same time, with savepoints and roll-backs.
my $script = PostgreSQL::Test::Utils::tempdir() . '/change.pgbench';
append_to_file($script, q{
	\set id random(1, 100)
	\set post random(1, 10)
	\set what random(1, 5)
	\if :what = 1
	INSERT INTO app.likes VALUES (:id, :post, 'y') ON CONFLICT (id) DO UPDATE SET post_id = EXCLUDED.post_id;
	\elif :what = 2
	DELETE FROM app.likes WHERE id = :id;
	\elif :what = 3
	UPDATE app.likes SET post_id = nullif(:post, 5) WHERE id = :id;
	\elif :what = 4
	BEGIN;
	DELETE FROM app.likes WHERE id = :id;
	ROLLBACK;
	\else
	BEGIN;
	SAVEPOINT s;
	UPDATE app.likes SET post_id = :post WHERE id = :id;
	ROLLBACK TO s;
	INSERT INTO app.likes VALUES (:id, :post, 'z') ON CONFLICT (id) DO UPDATE SET note = 'z';
	COMMIT;
	\endif
});
command_ok(
	[
		'pgbench', '-n', '-c', '6', '-j', '2', '-t', sized(300, 10), '-f', $script,
		'-h', $node->host, '-p', $node->port, $db
	],
	'sessions change rows concurrently');
is_exact('the rows that are there in the end are counted');

# A dump and its restore: the rows come before the triggers, and are not
# counted; what comes later is, also with the empty search_path of a dump.
my $dump = PostgreSQL::Test::Utils::tempdir() . '/dump.sql';
my $data = PostgreSQL::Test::Utils::tempdir() . '/data.sql';
my $count = $node->safe_psql($db, 'SELECT count(*) FROM app.likes');
$node->command_ok([ 'pg_dump', '-f', $dump, $db ], 'the database is dumped');
$node->command_ok([ 'pg_dump', '-a', '-t', 'app.likes', '-f', $data, $db ],
	'the rows are dumped');
$node->safe_psql($db, 'CREATE DATABASE restored');
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $dump, 'restored' ],
	'the database is restored');
$node->safe_psql('restored', q{
	ALTER FOREIGN TABLE app.by_row OPTIONS (SET interval '1h');
	ALTER FOREIGN TABLE app.by_statement OPTIONS (SET interval '1h');
});
my $counted = 'SELECT coalesce((SELECT sum(count) FROM app.by_row), 0), coalesce((SELECT sum(count) FROM app.by_statement), 0)';
is($node->safe_psql('restored', $counted), '0|0',
	'restored rows are not counted again');
$node->safe_psql('restored', 'TRUNCATE app.likes');
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $data, 'restored' ],
	'the rows are restored where the triggers are');
is($node->safe_psql('restored', $counted), "$count|$count",
	'the triggers count with an empty search_path');

# What logical replication brings is counted by triggers that are enabled for
# it.  (Statements are not replicated, only rows.)
$node->safe_psql('restored', q{
	TRUNCATE app.by_row, app.by_statement;
	ALTER TABLE app.likes ENABLE ALWAYS TRIGGER each;
});
(my $connstr = $node->connstr($db)) =~ s/'/''/g;
$node->safe_psql($db, q{
	CREATE PUBLICATION likes FOR TABLE app.likes;
	SELECT pg_create_logical_replication_slot('likes', 'pgoutput');
});
$node->safe_psql('restored', qq{
	CREATE SUBSCRIPTION likes CONNECTION '$connstr' PUBLICATION likes
	WITH (create_slot = false, slot_name = likes, copy_data = false)
});
$node->safe_psql($db, q{
	INSERT INTO app.likes SELECT i, 5000 FROM generate_series(5001, 5100) i;
	UPDATE app.likes SET post_id = 5001 WHERE id > 5090;
	UPDATE app.likes SET note = 'new' WHERE post_id = 5000;
	DELETE FROM app.likes WHERE id BETWEEN 5001 AND 5040;
});
wait_for($node, 'restored', q{
		SELECT string_agg(post_id || ': ' || count, ', ' ORDER BY post_id) = '5000: 50, 5001: 10' FROM app.by_row},
	'replicated rows are counted');
is($node->safe_psql('restored', 'SELECT count(*) FROM app.by_statement'), '0',
	'by the trigger that is enabled for them');
$node->safe_psql('restored', 'DROP SUBSCRIPTION likes');

# A trigger that waits for the commit counts when the transaction is prepared,
# too late for it: that is refused, and nothing is counted.
$node->safe_psql($db, q{
	CREATE TABLE later (key int);
	CREATE FOREIGN TABLE later_counts (key int, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'app.store_by_row', interval '1h', timeout '1h');
	CREATE CONSTRAINT TRIGGER later AFTER INSERT ON later DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION sb_trigger('public.later_counts', 'key');
});
my ($ret, $stdout, $stderr) = $node->psql($db, q{
	BEGIN;
	INSERT INTO later VALUES (1);
	PREPARE TRANSACTION 'later';
});
like($stderr, qr/cannot PREPARE a transaction that has incremented buffer "later_counts"/,
	'a transaction whose deferred triggers count is not prepared');
is($node->safe_psql($db, q{
		SELECT count(*) FROM pg_prepared_xacts;
		SELECT count(*) FROM later;
		SELECT count(*) FROM later_counts}),
	"0\n0\n0", 'and counts nothing');
$node->safe_psql($db, 'INSERT INTO later VALUES (1), (1)');
is($node->safe_psql($db, 'SELECT * FROM later_counts'), '1|2',
	'one that commits does');

# Columns that are not stored have no values for triggers to see.
SKIP:
{
	skip 'generated columns are stored before PostgreSQL 18', 1
	  if $node->pg_version < 18;
	$node->safe_psql($db, q{
		CREATE TABLE virtual (id int, key int GENERATED ALWAYS AS (id / 10) VIRTUAL);
		CREATE TRIGGER virtual AFTER INSERT ON virtual
			FOR EACH ROW EXECUTE FUNCTION sb_trigger('public.later_counts', 'key');
	});
	($ret, $stdout, $stderr) = $node->psql($db, 'INSERT INTO virtual VALUES (1)');
	like($stderr, qr/cannot count by virtual generated column "key"/,
		'a key can not be a virtual generated column');
}

$node->stop;
done_testing();
