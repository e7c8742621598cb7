# Clients of Node.js count: node-postgres, postgres.js, Prisma with its adapter
# for node-postgres, TypeORM and Sequelize; and what the last two make of buffers
# and views when they alter a database.
#
# dev/check has npm install the packages of clients/node/package.json in a
# temporary directory, which is in NODE_PATH.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use File::Copy;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my ($nodejs) = programs('node') or plan skip_all => 'nodejs is not installed';
my $node = client_node('node');
my $tested = 0;

sub has
{
	my ($package) = @_;
	my $has = can_run("npm's package $package", $nodejs, '-e', "require.resolve('$package')");

	$tested++ if $has;
	return $has;
}

# --- drivers ----------------------------------------------------------------

if (has('pg'))
{
	my $seen = run_client({}, $nodejs, program('node/with_pg.js'));

	is($seen->{row}, '42P18', 'parameters in ROW() have no type');
	is($seen->{type}, 'string', 'a total is a string, as every bigint');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added');
	counted('pg', $seen);
}

if (has('postgres'))
{
	my $seen = run_client({}, $nodejs, program('node/with_postgres.js'));

	is($seen->{rollback}, 'undo', 'a transaction was rolled back');
	is($seen->{savepoint}, 'undo', 'a savepoint was');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added');
	counted('postgres.js', $seen);
}

# --- ORMs -------------------------------------------------------------------

# Prisma's client is made of the schema.
if (has('@prisma/client/package.json') && has('@prisma/adapter-pg'))
{
	my $base = PostgreSQL::Test::Utils::tempdir_short();
	my ($modules) = grep { -e "$_/prisma" } split /:/, $ENV{NODE_PATH};

	copy(program("node/$_"), $base) foreach 'package.json', 'schema.prisma';
	symlink $modules, "$base/node_modules";
	{
		# It would look for newer versions, and download a program that only
		# migrations need.
		local @ENV{qw(CHECKPOINT_DISABLE PRISMA_HIDE_UPDATE_MESSAGE)} = (1, 1);
		local $ENV{PRISMA_SCHEMA_ENGINE_BINARY} = $nodejs;
		local $ENV{DATABASE_URL} = 'postgresql://localhost/postgres';
		command_ok([ $nodejs, "$modules/prisma/build/index.js", 'generate', "--schema=$base/schema.prisma" ], 'a client is made');
	}
	my $seen = run_client({}, $nodejs, program('node/with_prisma.js'), "$base/client");

	is($seen->{function}, 1, '$queryRaw takes the result of the function');
	is($seen->{returned}, 1, 'update() returns what was added');
	is($seen->{rows}, 1, 'updateMany() tells that it has updated a row');
	is($seen->{upsert}, 'done', 'upsert() of a row that is there');
	is($seen->{hit}, 'refused', 'the buffer cannot be updated');
	counted('prisma', $seen);
}

# What they alter, they alter as the owner.
my %as_owner = client_environment(undef, 'shop', 'shop_owner');
my $definitions = q{
	SELECT c.relname, attname, attnotnull, format_type(atttypid, atttypmod), pg_get_expr(adbin, adrelid),
		(SELECT count(*) FROM pg_constraint WHERE conrelid = c.oid)
	FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid LEFT JOIN pg_attrdef d ON adrelid = c.oid AND adnum = attnum
	WHERE c.relname IN ('article', 'hits') AND attnum > 0 ORDER BY 1, attnum};
my $before = sql($definitions);

if (has('typeorm'))
{
	my $seen = run_client({}, $nodejs, program('node/with_typeorm.js'));

	is($seen->{rows}, 1, 'increment() tells that it has updated a row');
	counted('typeorm', $seen);

	$seen = run_client(\%as_owner, $nodejs, program('node/with_typeorm.js'), 'synchronize');
	like($seen->{Article}, qr/^ALTER TABLE "article" .* PRIMARY KEY/, 'it takes the view for a table that has changed');
	is($seen->{Hit}, 'ALTER TABLE "hits" ADD CONSTRAINT ... PRIMARY KEY ("path")', 'and the buffer for one');
	is($seen->{synchronize}, '42809', 'and fails');
	is($seen->{'not synchronized'}, 'nothing', 'nothing, if the entity says so');
	is(sql($definitions), $before, 'nothing was altered');
}

if (has('sequelize'))
{
	my $seen = run_client({}, $nodejs, program('node/with_sequelize.js'));

	counted('sequelize', $seen);

	$seen = run_client(\%as_owner, $nodejs, program('node/with_sequelize.js'), 'alter');
	like($seen->{article}, qr/^42809; ALTER TABLE "article" ALTER COLUMN/, 'it takes the view for a table, and fails');
	is($seen->{hits}, 'done; ALTER TABLE "hits" ALTER COLUMN "views" SET NOT NULL;'
		  . 'ALTER TABLE "hits" ALTER COLUMN "views" SET DEFAULT 1;ALTER TABLE "hits" ALTER COLUMN "views" TYPE BIGINT;',
		'it alters the buffer');
	is(sql($definitions), $before, 'which is then as it was');
}

plan skip_all => 'none of these clients is installed' unless $tested;
has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
